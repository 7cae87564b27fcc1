"""bm25: words in common, weighted by how rare they are.

    score(q, d) = sum over t in q of ln(1 + (N - df + 0.5) / (df + 0.5)) tf / (tf + k1 (1 - b + b |d| / mean |d|))

Robertson and Zaragoza 2009 (FnTIR 3), in Lucene's variant; the arrays are `bm25s`'s, see `retrieve.bm25`. Additions
are taken in with the next search: idf and mean length belong to all passages. Removed ones leave with the next
addition, and count in idf until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.retrieve.bm25 import BM25
from modicum.retrieve.indexes import Hits
from modicum.retrieve.retrievers import Retriever, read_texts, write_texts


@dataclass(frozen=True, kw_only=True)
class Config:
    k1: Annotated[float, Field(ge=0)] = 1.5  # how soon repetitions of a term stop to count
    b: Annotated[float, Field(ge=0, le=1)] = 0.75  # how much long passages are held back


class Lexical(Retriever):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        self.texts: list[str] = []
        self._model: BM25 | None = None
        self._rows_A = np.empty(0, np.int64)  # rows that were there when it was built

    def _add(self, texts: list[str]) -> None:
        self.texts += texts
        self._model = None

    def _lexicon(self) -> BM25:
        if self._model is None:
            self._rows_A = np.flatnonzero(self.alive_N)
            self._model = BM25.build((self.texts[r] for r in self._rows_A), k1=self.config.k1, b=self.config.b)
        return self._model

    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        model = self._lexicon()
        subset = None if rows_S is None else np.flatnonzero(np.isin(self._rows_A, rows_S))
        hits = model.search(queries, k, subset)
        return Hits(np.where(hits.ids_QK >= 0, self._rows_A[hits.ids_QK], -1), hits.scores_QK)

    def nbytes(self) -> int:
        return self._lexicon().nbytes()

    def _write(self, folder: Path) -> None:
        write_texts(folder / "texts.parquet", self.texts)

    def _read(self, folder: Path) -> None:
        self.texts = read_texts(folder / "texts.parquet")
