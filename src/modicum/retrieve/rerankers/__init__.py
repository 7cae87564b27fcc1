"""port reranker: a better order for what a first search returned, by an expensive scorer.

Shape letters: C candidates of a query, K results, P passages.

A method is constructed as `cls(config, scorer)`. The `Scorer` is any model that reads a query together with passages:
a cross-encoder, which scores pairs, or a language model, which orders a list. It counts its calls and the tokens it
read, which is what rerankers are compared by.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.core.registry import Method

BASELINE = "none"


class Scorer:
    """score: (query, passages) -> one number for each, larger is better. order: (query, passages) -> the reply of a
    language model that was shown them numbered from 1, such as "[2] > [1] > [3]". One of the two may be missing."""

    def __init__(
        self,
        passages: Sequence[str],
        *,
        score: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
        order: Callable[[str, Sequence[str]], str] | None = None,
        count: Callable[[str], int] = lambda text: len(text.split()),
    ):
        self.passages, self._score, self._order, self._count = passages, score, order, count
        self.calls = 0  # pairs scored, or lists ordered
        self.tokens = 0  # of queries and passages that were read

    def score(self, query: str, rows: Sequence[int]) -> np.ndarray:
        """scores_C, float64, of the passages in these rows."""
        if self._score is None:
            raise UserError("this reranker scores pairs, and the scorer orders lists; give a cross-encoder as score=")
        texts = [self.passages[r] for r in rows]
        self.calls += len(texts)
        self._read(query, texts, pairs=True)
        return np.asarray(self._score(query, texts), np.float64) if texts else np.empty(0)

    def order(self, query: str, rows: Sequence[int]) -> str:
        """The reply about the passages in these rows, numbered from 1."""
        if self._order is None:
            raise UserError("this reranker orders lists, and the scorer scores pairs; give a language model as order=")
        texts = [self.passages[r] for r in rows]
        self.calls += 1
        self._read(query, texts, pairs=False)
        return self._order(query, texts)

    def _read(self, query: str, texts: Sequence[str], *, pairs: bool) -> None:
        queries = len(texts) if pairs else 1
        self.tokens += queries * self._count(query) + sum(self._count(t) for t in texts)


class Reranker(Method):
    """Base class. A method defines `rank`, and `prepare` where it needs work before the first query."""

    def __init__(self, config: Any, scorer: Scorer):
        self.config, self.scorer = config, scorer

    def prepare(self, queries: Sequence[str]) -> None:
        """Work that is done once, with queries like those to come; its calls are counted like any."""

    @abstractmethod
    def rank(self, query: str, rows_C: np.ndarray, k: int) -> np.ndarray:
        """rows_K, best first, each once: of the candidates (best of the first search first), or of all passages."""
