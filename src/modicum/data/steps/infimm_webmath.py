"""infimm-webmath: keep text of one topic, first with hardly a loss, and later with hardly a stranger.

The two classifiers of a pipeline that mines one topic (mathematics, in the paper) out of the web, as one fitted step
that is used twice. The first stands before the costly work and may lose almost nothing; the last is taught by a
judge's scores and lets almost nothing wrong through. Each probability stays with the document.

    p(d) = sigmoid(w . x(d) + c)                     words and word pairs of d
    recall=0.98     threshold = the quantile 1 - 0.98 of p over validation texts of the target
    precision=0.95  threshold = the least t with precision of {p >= t} at least 0.95 over labelled validation documents

With `recall` the positives are `targets` and the negatives the sample itself, in which the topic is rare. With
`precision` both come from the documents of the sample whose metadata have a number in `label`, positive from
`positive_from` on. A fifth of each, by a hash, sets the threshold and trains nothing.

Han et al. 2024, arXiv:2409.12568, section 3: high-recall fastText, deduplication and rules, high-precision fastText
taught by a language model's scores. Departs from the paper: logistic regression instead of fastText; thresholds come
from validation texts instead of being given. A formula lost when the page was read is not selected back: see the
reader.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from modicum.core.errors import UserError
from modicum.data.document import Document, Drop
from modicum.data.linear import Linear
from modicum.data.steps import Step, sample_key
from modicum.data.steps._selection import target_texts

CLAIM = {
    "figure": "a 1.3B model equal to DeepSeekMath-1.3B with a third of its tokens",
    "where": "abstract",
    "scale": "24M pages of Common Crawl, 40B tokens",
}

SWEEP = ("recall=0.98", "precision=0.95")


@dataclass(frozen=True, kw_only=True)
class Config:
    targets: list[str] = field(default_factory=list)  # files of texts of the topic, for `recall`
    text_field: str = "text"  # of their records
    recall: float = 0.98  # of the topic's texts that the step keeps; used unless `precision` is given
    precision: float = 0.0  # of what it keeps, by the labels; 0: choose by recall
    label: str = "topic_score"  # metadata with a judge's score, for `precision`
    positive_from: float = 0.5  # of that score
    meta: str = "topic_prob"  # metadata that the probability is written to
    sample: int = 10_000  # documents to learn from
    examples: int = 10_000  # of the targets at most

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1 or not 0 <= self.precision <= 1 or self.sample < 2:
            raise ValueError("recall lies in (0, 1], precision in [0, 1], sample is at least 2")


class InfimmWebmath(Step):
    config: Config
    relative = True  # the threshold is one of the sample

    def __init__(self, config: Config):
        super().__init__(config)
        self.sample, self.classifier, self.threshold = config.sample, Linear(), 0.0

    def sources(self) -> Sequence[str]:
        return self.config.targets

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        positive, negative = self._labelled(sample) if self.config.precision else self._against(sample)
        train, validate = zip(_parts(positive), _parts(negative), strict=True)
        classifier = Linear().fit(*train)
        right = classifier.probabilities(validate[0])
        if self.config.precision:
            threshold = threshold_of_precision(right, classifier.probabilities(validate[1]), self.config.precision)
        else:
            threshold = threshold_of_recall(right, self.config.recall)
        return classifier.state() | {"topic_threshold": np.array([threshold])}

    def _against(self, sample: Sequence[Document]) -> tuple[list[str], list[str]]:
        by_target = target_texts("infimm-webmath", self.config.targets, self.context, self.config.text_field)
        texts = [text for name in sorted(by_target) for text in by_target[name]]
        rng = np.random.default_rng([self.context.seed, 7])
        chosen = np.sort(rng.permutation(len(texts))[: self.config.examples])
        return [texts[int(i)] for i in chosen], [d.text for d in sample]

    def _labelled(self, sample: Sequence[Document]) -> tuple[list[str], list[str]]:
        sides: tuple[list[str], list[str]] = ([], [])
        for d in sample:
            score = d.meta.get(self.config.label)
            if isinstance(score, int | float):
                sides[score < self.config.positive_from].append(d.text)
        if min(map(len, sides)) < 2:
            raise UserError(
                f"infimm-webmath:precision={self.config.precision} learns from scores in the field "
                f"{self.config.label!r}; of {len(sample)} documents of the sample {len(sides[0])} have one from "
                f"{self.config.positive_from:g} on and {len(sides[1])} one below: give scored documents, or label=FIELD"
            )
        return sides

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.classifier.set_state(dict(arrays))
        self.threshold = float(arrays["topic_threshold"][0])

    def each(self, document: Document) -> Iterable[Document | Drop]:
        p = float(self.classifier.probabilities([document.text])[0])
        if p < self.threshold:
            yield Drop(document.id, "off-topic", f"probability {p:.3f}, kept from {self.threshold:.3f} on")
        else:
            yield dataclasses.replace(document, meta=document.meta | {self.config.meta: round(p, 4)})


def _parts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Four fifths to train on, one to set the threshold, by a hash of the text; both hold at least one."""
    keyed = sorted((sample_key(text), i) for i, text in enumerate(texts))
    count = max(1, len(keyed) // 5)
    validate = {i for _, i in keyed[:count]} if len(keyed) > 1 else set()
    train = [t for i, t in enumerate(texts) if i not in validate]
    return train, [texts[i] for i in sorted(validate)] or train


def threshold_of_recall(positive_N: np.ndarray, recall: float) -> float:
    """The largest t such that at least `recall` of the positives have p >= t."""
    ordered = np.sort(positive_N)
    return float(ordered[int(np.floor((1 - recall) * len(ordered) + 1e-9))])


def threshold_of_precision(positive_N: np.ndarray, negative_N: np.ndarray, precision: float) -> float:
    """The least t with precision of {p >= t} at least `precision`; the one of highest precision if none has it."""
    candidates = np.unique(positive_N)
    right = (positive_N >= candidates[:, None]).sum(axis=1)
    wrong = (negative_N >= candidates[:, None]).sum(axis=1)
    reached = right / (right + wrong)
    enough = np.flatnonzero(reached >= precision)
    return float(candidates[enough[0] if len(enough) else int(np.argmax(reached))])
