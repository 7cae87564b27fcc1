"""pointwise: the first `calls` candidates, by the score of each pair.

    rank(q, d_1 ... d_C) = d_1 ... d_B sorted by s(q, d), then d_(B+1) ... as they were        B = calls

Nogueira and Cho 2019, arXiv:1901.04085: a cross-encoder reads query and passage together. Departs: the scorer is
whatever is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from modicum.retrieve.rerankers import Reranker


@dataclass(frozen=True, kw_only=True)
class Config:
    calls: Annotated[int, Field(ge=1)] = 50  # pairs scored for a query


SWEEP = ("calls=25", "calls=50", "calls=100")


class Pointwise(Reranker):
    config: Config

    def rank(self, query: str, rows_C: np.ndarray, k: int) -> np.ndarray:
        scored, rest = rows_C[: self.config.calls], rows_C[self.config.calls :]
        order = np.argsort(-self.scorer.score(query, scored.tolist()), kind="stable")
        return np.concatenate([scored[order], rest])[:k]
