"""attribute: score each document for a quality of its text (toxicity, sentiment, style), and drop those out of bounds.

    a(d) = sigmoid(w . x(d) + c)      words and word pairs of d; learnt from texts with and without it
    drop   a(d) < low                 ("too-low", the inverse filter)
    drop   a(d) >= high               ("too-high")

Both bounds at their defaults drop none: the probability stays with the document as the number `name`, for a study that
cuts at several thresholds (`pretrainers-guide`). With `quality` as the name it is the document's quality.

The two-sided attribute filter of Longpre et al. 2023, arXiv:2305.13169, section 5: a toxicity score from 0 to 1, at
several thresholds, and the inverse. Departs: any attribute, by logistic regression on examples of both kinds that the
user gives, where the paper asks Perspective and a classifier of Wikipedia and books. What it learns is as good as the
examples: a stand-in for toxicity is not toxicity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.linear import Linear
from modicum.data.steps import Step
from modicum.data.steps._selection import level, target_texts

NOT_MEASURABLE = "it is as good as the examples it is given; by default it drops none"


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "attribute"  # of the number in the documents' metadata
    positive: list[str] = field(default_factory=list)  # files of texts that have it
    negative: list[str] = field(default_factory=list)  # files of texts that lack it; none: documents of the corpus
    text_field: str = "text"  # of their records
    examples: int = 50_000  # of each file at most
    low: float = 0.0  # documents below are dropped
    high: float = 1.0  # documents at or above are dropped; 1: none
    sample: int = 10_000  # documents of the corpus, where no negatives are given

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or self.sample < 1 or self.examples < 1:
            raise ValueError("0 <= low < high <= 1, sample and examples at least 1")


class Attribute(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.sample = 1 if config.negative else config.sample
        self.classifier = Linear()

    def sources(self) -> Sequence[str]:
        return [*self.config.positive, *self.config.negative]

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        config = self.config

        def texts(files: Sequence[str]) -> list[str]:
            by_file = target_texts("attribute", files, self.context, config.text_field)
            return level(by_file, self.context.seed, config.examples)

        negative = texts(config.negative) if config.negative else [d.text for d in sample]
        return self.classifier.fit(texts(config.positive), negative).state()

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.classifier.set_state(dict(arrays))

    def each(self, document: Document) -> Iterable[Document | Drop]:
        p = float(self.classifier.probabilities([document.text])[0])
        if p < self.config.low:
            yield Drop(document.id, "too-low", f"{self.config.name} {p:.3f}, kept from {self.config.low:g} on")
        elif p >= self.config.high < 1:
            yield Drop(document.id, "too-high", f"{self.config.name} {p:.3f}, kept below {self.config.high:g}")
        else:
            yield dataclasses.replace(document, meta=document.meta | {self.config.name: round(p, 4)})
