"""preselect: keep text on which better models have the lower loss: the data that predicts their ability.

Several models, ordered by ability, read a sample of the pool. A document's strength is the share of pairs of models
that its losses put in the right order. The documents that order all pairs rightly against as many of the weakest teach
a light classifier on the text, which scores the whole pool; the best are kept until `keep` of the text is reached.

    C_i(d)      = nats of d under model i, A_1 < ... < A_N its abilities
    strength(d) = sum over i < j of [C_i(d) > C_j(d)] / (N (N - 1) / 2)        a tie counts as wrong

Losses are of the same beginning of a text and of all of it, never means over tokens: models may have other tokenizers.

Shum et al. 2025, arXiv:2503.00808, section 3. Departs from the paper: where fewer than `least` of the sample order all
pairs, the strongest `least` are the positives; documents shorter than `shortest` characters teach nothing; the
classifier is a logistic regression on hashed words and word pairs instead of fastText; the share is one of UTF-8 bytes.
The paper's models are of one family and far apart in size. Models of one size that were trained on other mixtures make
this a method that matches a target: their order is then that of the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.core.errors import UserError
from modicum.data.document import Document
from modicum.data.linear import Linear
from modicum.data.steps._selection import Selection, check_keep

CLAIM = {
    "figure": "a mean of 33.4 over 15 tasks where random text gives 28.1 for as many tokens and 31.3 for ten times",
    "where": "Table 1",
    "scale": "1B parameters, 30B tokens",
}

SWEEP = ("sample=1200,characters=400",)  # small proxies read slowly


@dataclass(frozen=True, kw_only=True)
class Config:
    keep: float = 0.1  # share of the text that stays
    sample: int = 10_000  # documents whose losses are computed
    characters: int = 2_000  # of each text that the models read
    shortest: int = 200  # characters; a shorter text's loss is noise
    least: float = 0.15  # of the sample that are positives, if fewer order all pairs

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 < self.least <= 0.5 or self.sample < 2 or self.characters < 1:
            raise ValueError("least lies in (0, 0.5], sample is at least 2, characters at least 1")


class Preselect(Selection):
    config: Config
    signals = ("losses",)

    def __init__(self, config: Config):
        super().__init__(config)
        self.sample, self.classifier = config.sample, Linear()

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        heads = [d.text[: self.config.characters] for d in sample]
        long = [i for i, d in enumerate(sample) if len(d.text) >= self.config.shortest] or list(range(len(sample)))
        losses_NM = self.context.signals.column("losses", [heads[i] for i in long])
        if losses_NM.shape[1] < 2:
            raise UserError("preselect compares models; give at least two, from the weakest to the strongest")
        positive, negative = classes(strength(losses_NM), self.config.least)
        texts = [sample[i].text for i in long]
        return Linear().fit([texts[i] for i in positive], [texts[i] for i in negative]).state()

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.classifier.set_state(dict(arrays))

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        return self.classifier.logits(texts)


def strength(losses_NM: np.ndarray) -> np.ndarray:
    """float64 [N]: the share of pairs i < j of models with losses_Ni > losses_Nj."""
    M = losses_NM.shape[1]
    right = sum((losses_NM[:, i] > losses_NM[:, j]).astype(np.int64) for i in range(M) for j in range(i + 1, M))
    return np.asarray(right) / (M * (M - 1) / 2)


def classes(strength_N: np.ndarray, least: float) -> tuple[list[int], list[int]]:
    """(positives, negatives), as many of each: those of strength 1, or the strongest; and the weakest."""
    order = np.argsort(-strength_N, kind="stable")
    count = max(int((strength_N == 1).sum()), round(least * len(order)), 1)
    count = min(count, len(order) // 2)
    return order[:count].tolist(), order[::-1][:count].tolist()
