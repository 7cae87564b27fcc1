"""none: the order of the first search.

    rank(q, d_1 ... d_C) = d_1 ... d_k        no call of the scorer

What a reranker is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.retrieve.rerankers import Reranker


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class NoReranker(Reranker):
    config: Config

    def rank(self, query: str, rows_C: np.ndarray, k: int) -> np.ndarray:
        return rows_C[:k]
