"""betr: keep the text that is nearest to examples of the benchmarks, by rank rather than by distance.

A sample of the pool is embedded, and so is the same number of training examples of each benchmark. For every example
the sample is ranked by cosine, and a document is as good as its best rank. The best tenth of the sample against as
many of the rest teach a light classifier on the text, which then scores the whole pool; the best are kept until `keep`
of the text is reached.

    r_ij    = rank of document j among the sample by cos(e_i, e_j), 1 = nearest
    score_j = max_i v(r_ij),  v decreasing:  the order of -min_i r_ij          aggregate = max
    score_j = mean_i log2(1 / r_ij)                                            aggregate = mean

Ranks, not cosines: a benchmark whose examples lie close together would otherwise take everything.

Mizrahi et al. 2025, arXiv:2507.12466, sections 3.3 to 3.6. Departs from the paper: equal best ranks, of which there are
as many as examples, are ordered by that example's cosine; the classifier is a logistic regression on hashed words and
word pairs instead of fastText; the share is one of UTF-8 bytes; without an encoder (`--encoder`) the embedding is LSA
of the sample. Only a text's beginning is embedded. Examples must come from the benchmarks' training side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from modicum.data.document import Document
from modicum.data.linear import Linear
from modicum.data.steps._selection import Selection, Space, check_keep, level, target_texts

CLAIM = {
    "figure": "the score of DCLM-Baseline's selection for 2.1 times less compute, that of no filter for 4.7 times less",
    "where": "abstract; section 5.1",
    "scale": "more than 500 models, 1e19 to 1e22 FLOPs",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    keep: float = 0.1  # share of the text that stays
    targets: list[str] = field(default_factory=list)  # files of examples, one for each benchmark
    text_field: str = "text"  # of their records
    sample: int = 10_000  # documents that are embedded and ranked
    positives: float = 0.1  # of the sample that teach the classifier what to keep
    aggregate: str = "max"  # over examples: max, mean
    examples: int = 2_000  # of each benchmark at most
    dims: int = 256  # of LSA, where the run has no encoder
    characters: int = 2_000  # of each text that are embedded

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.aggregate not in ("max", "mean"):
            raise ValueError(f"aggregate={self.aggregate} must be max or mean")
        if not 0 < self.positives < 1 or self.sample < 2 or self.examples < 1:
            raise ValueError("positives lies between 0 and 1, sample is at least 2, examples at least 1")


TOY = Config(keep=0.5, positives=0.3, dims=8)


class Betr(Selection):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.sample, self.classifier = config.sample, Linear()

    def sources(self) -> Sequence[str]:
        return self.config.targets

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        config, seed = self.config, self.context.seed
        by_target = target_texts("betr", config.targets, self.context, config.text_field)
        examples = level(by_target, seed, config.examples)
        texts = [d.text for d in sample]
        space = Space(self.context, config.characters).fit(texts, config.dims)
        order = ranked(space(examples), space(texts), config.aggregate)
        return classes(texts, order, config.positives, seed).state()

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.classifier.set_state(dict(arrays))

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        return self.classifier.logits(texts)


def ranked(examples_ED: np.ndarray, sample_ND: np.ndarray, aggregate: str = "max") -> np.ndarray:
    """Numbers of the sample's documents from the best to the worst. Of equal cosines the lower number ranks first."""
    n = len(sample_ND)
    least_N, cosine_N, sum_N = np.full(n, n + 1), np.full(n, -np.inf), np.zeros(n)
    for example_D in examples_ED:
        cos_N = (sample_ND @ example_D).astype(np.float64)
        rank_N = np.empty(n, np.int64)
        rank_N[np.argsort(-cos_N, kind="stable")] = np.arange(1, n + 1)
        better = (rank_N < least_N) | ((rank_N == least_N) & (cos_N > cosine_N))
        least_N[better], cosine_N[better] = rank_N[better], cos_N[better]
        sum_N -= np.log2(rank_N)
    if aggregate == "mean":
        return np.argsort(-sum_N, kind="stable")
    return np.lexsort((np.arange(n), -cosine_N, least_N))


def classes(texts: Sequence[str], order: np.ndarray, positives: float, seed: int) -> Linear:
    """A classifier of the first `positives` of `order` against as many of the rest, drawn by `seed`."""
    count = max(1, round(positives * len(order)))
    rest = order[count:]
    drawn = rest[np.sort(np.random.default_rng([seed, 5]).permutation(len(rest))[:count])]
    return Linear().fit([texts[int(i)] for i in order[:count]], [texts[int(i)] for i in drawn])
