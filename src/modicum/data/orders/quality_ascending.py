"""quality-ascending: the best documents last: a curriculum by quality scores.

A model forgets what it saw early and ends as what it saw last, so the best text comes at the end. Chunks ascend by
their documents' scores in grades of equal size, those without a score first, and are shuffled within a grade:
documents of the same score would otherwise come in a fixed order, and one long document would fill batch after
batch.

    grade(c) = floor(rank(score of c) grades / chunks),   grades = max(chunks / chunks_per_grade, 16)

An epoch that the run will not finish ascends over a random part of it, as long as what will be read, so that a short
run comes to the best as well.

Luo et al. 2025, arXiv:2511.18903, section 3. Departs from the paper: grades, and the order is within each domain, while
the mixture holds between them. Scores are a record's `quality`, or what the step `score` gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.data.orders import Epoch, Order
from modicum.data.shards import Documents


@dataclass(frozen=True, kw_only=True)
class Config:
    chunks_per_grade: int = 256  # chunks that are shuffled among each other

    def __post_init__(self) -> None:
        if self.chunks_per_grade < 1:
            raise ValueError(f"chunks_per_grade={self.chunks_per_grade} must be at least 1")


class QualityAscending(Order):
    config: Config

    def __init__(self, config: Config, documents: Documents):
        super().__init__(config, documents)
        self.scores = {
            d: np.nan_to_num(documents.quality(d), nan=-np.inf) for d in documents.domains if documents.documents(d)
        }

    def arrange(self, epoch: Epoch) -> np.ndarray:
        numbers = epoch.shuffled()
        read = len(numbers)
        if epoch.remaining is not None:
            read = int(np.searchsorted(np.cumsum(epoch.sizes(numbers)), epoch.remaining)) + 1
        scores = self.scores[epoch.domain][epoch.documents(numbers)]
        parts = (slice(0, read), slice(read, None))
        return np.concatenate([numbers[p][self.graded(scores[p])] for p in parts])

    def graded(self, scores: np.ndarray) -> np.ndarray:
        """Order by grades of ascending score, each of equal size; within a grade as given."""
        n = len(scores)
        grades = min(max(n // self.config.chunks_per_grade, 16), n)
        grade = np.empty(n, np.int64)
        grade[np.argsort(scores, kind="stable")] = np.arange(n) * grades // max(n, 1)
        return np.argsort(grade, kind="stable")
