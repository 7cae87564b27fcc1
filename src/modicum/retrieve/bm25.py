"""Lexical search: BM25 by `bm25s`, with tokens suited to code and prose.

    score(q, d) = sum over t in q of idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
    idf(t)      = ln(1 + (N - df + 0.5) / (df + 0.5))

Robertson and Zaragoza 2009; the variant is Lucene's (Kamphuis et al. 2020). `bm25s` (Lù 2024, arXiv:2407.03618)
computes every term's score when it builds, so a search adds up one sparse column per term. A new collection
means a new build: idf and the mean length belong to the whole. Files are plain arrays and JSON, never pickles.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import CorruptError
from modicum.data.terms import tokenize
from modicum.retrieve.indexes import Hits


class BM25:
    """Rows are numbered in the order their texts were given."""

    def __init__(self, model: Any, n_rows: int):
        self._model, self.n_rows = model, n_rows

    @classmethod
    def build(cls, texts: Iterable[str], *, k1: float = 1.5, b: float = 0.75) -> BM25:
        """One pass over `texts`; memory holds four bytes per term occurrence, and the vocabulary."""
        import bm25s

        vocabulary = {"": 0}  # no text has this term; it keeps the table non-empty
        rows: list[array[int]] = []
        for text in texts:
            rows.append(array("i", [vocabulary.setdefault(t, len(vocabulary)) for t in tokenize(text)]))
        model = bm25s.BM25(method="lucene", k1=k1, b=b)
        if any(rows):
            model.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        return cls(model, len(rows))

    @property
    def _empty(self) -> bool:
        return getattr(self._model, "scores", None) is None

    def scores(self, query: str) -> np.ndarray:
        """scores_N (float32) of every row; 0 where no term matches."""
        ids = [] if self._empty else self._model.get_tokens_ids(tokenize(query))
        return self._model.get_scores_from_ids(ids) if ids else np.zeros(self.n_rows, np.float32)

    def search(self, queries: list[str], k: int, subset: np.ndarray | None = None) -> Hits:
        """The k best rows of each query; a row without a matching term is never a result. Ties go to the lower row."""
        hits = Hits.empty(len(queries), k)
        for q, query in enumerate(queries):
            scores_N = self.scores(query)
            rows = np.flatnonzero(scores_N > 0) if subset is None else subset[scores_N[subset] > 0]
            if len(rows) > k:  # keep all that tie with the k-th, then let the row number decide
                rows = rows[scores_N[rows] >= np.partition(scores_N[rows], len(rows) - k)[len(rows) - k]]
            rows = rows[np.lexsort((rows, -scores_N[rows]))][:k]
            hits.ids_QK[q, : len(rows)], hits.scores_QK[q, : len(rows)] = rows, scores_N[rows]
        return hits

    def save(self, folder: str | Path) -> None:
        """Write into `folder`; the caller makes that atomic."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not self._empty:
            self._model.save(str(folder), show_progress=False, allow_pickle=False)

    @classmethod
    def load(cls, folder: str | Path, n_rows: int) -> BM25:
        """Open memory-mapped; the files' checksums are the caller's to check."""
        import bm25s

        if not any(Path(folder).glob("*.json")):
            return cls(bm25s.BM25(method="lucene"), n_rows)
        try:
            model = bm25s.BM25.load(str(folder), mmap=True, allow_pickle=False, show_progress=False)
        except (OSError, ValueError, KeyError) as error:
            raise CorruptError(f"{folder} does not open ({error}); build the index again") from None
        if model.scores["num_docs"] != n_rows:
            raise CorruptError(f"{folder} holds {model.scores['num_docs']} rows, not {n_rows}; build it again")
        return cls(model, n_rows)

    def nbytes(self) -> int:
        return 0 if self._empty else sum(self._model.scores[a].nbytes for a in ("data", "indices", "indptr"))
