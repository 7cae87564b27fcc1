"""cur-cross-encoder: all scores of a query from its scores on anchor passages.

The scorer's matrix of queries by passages has low rank, so a few of its rows and columns determine the rest. Offline,
anchor queries are scored on every passage: R. Online, the query is scored on the anchor passages A alone, c, and

    row of the query  ~  c E        E = pinv(R[:, A]) R

so that E's columns are vectors of the passages and c is the query's, measured instead of computed; an inner-product
index over E searches them (vectors keep their lengths). The best passages by c E outside A are scored exactly with
what is left of `calls`; together with the anchors' known scores they are the result.

Yadav et al. 2022, arXiv:2210.12579 (EMNLP), section 3. Anchors are drawn at random; fewer anchor passages than anchor
queries, as near equal numbers the intersection is close to singular (`rcond` cuts its small singular values). Scores
should be logits: a sigmoid raises the rank. Departs: the candidates of the first search are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve.rerankers import Reranker, Scorer


@dataclass(frozen=True, kw_only=True)
class Config:
    calls: Annotated[int, Field(ge=2)] = 50  # pairs scored for a query: anchors and exact scores
    anchors: Annotated[float, Field(gt=0, lt=1)] = 0.5  # fraction of them spent on anchor passages
    queries: Annotated[int, Field(ge=1)] = 100  # most anchor queries
    rcond: Annotated[float, Field(ge=0)] = 1e-3  # singular values below this fraction of the largest count as zero
    index: str = "exact"  # method of port index over the passages' vectors
    seed: int = 0


TOY = Config(calls=12, rcond=1e-9)
SWEEP = ("calls=25", "calls=50", "calls=100")


class CUR(Reranker):
    config: Config

    def __init__(self, config: Any, scorer: Scorer):
        super().__init__(config, scorer)
        self.anchors_A = np.empty(0, np.int64)
        self.index: Any = None

    def prepare(self, queries: Sequence[str]) -> None:
        c = self.config
        rng = np.random.default_rng(c.seed)
        if not len(queries):
            raise UserError("cur-cross-encoder needs queries to score all passages for; give some to prepare")
        chosen = rng.permutation(len(queries))[: c.queries]
        count = len(self.scorer.passages)
        rows = list(range(count))
        scores_QP = np.stack([self.scorer.score(queries[q], rows) for q in sorted(chosen.tolist())])
        self.fit(scores_QP, np.sort(rng.permutation(count)[: min(max(1, round(c.anchors * c.calls)), count)]))

    def fit(self, scores_QP: np.ndarray, anchors_A: np.ndarray) -> None:
        """From the scores of the anchor queries on all passages."""
        self.anchors_A = anchors_A
        vectors_AP = np.linalg.pinv(scores_QP[:, anchors_A], rcond=self.config.rcond) @ scores_QP
        self.index = build("index", self.config.index)
        self.index.build([(np.arange(scores_QP.shape[1]), np.ascontiguousarray(vectors_AP.T, np.float32))])

    def approximate(self, anchor_scores_A: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows_K, scores_K) of the approximated row, best first."""
        hits = self.index.search(anchor_scores_A[None].astype(np.float32), k)
        return hits.ids_QK[0], hits.scores_QK[0]

    def rank(self, query: str, rows_C: np.ndarray, k: int) -> np.ndarray:
        if self.index is None:
            raise UserError("cur-cross-encoder has no anchors yet; call prepare with queries first")
        known_A = self.scorer.score(query, self.anchors_A.tolist())
        wanted = max(k, self.config.calls) + len(self.anchors_A)
        near, _ = self.approximate(known_A, min(wanted, len(self.scorer.passages)))
        others = near[(near >= 0) & ~np.isin(near, self.anchors_A)]
        scored = others[: max(self.config.calls - len(self.anchors_A), 0)]
        rows = np.concatenate([self.anchors_A, scored])
        order = np.argsort(-np.concatenate([known_A, self.scorer.score(query, scored.tolist())]), kind="stable")
        return np.concatenate([rows[order], others[len(scored) :]])[:k]
