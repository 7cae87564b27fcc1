"""Reciprocal-rank fusion: one ranking from several.

    score(d) = sum over rankings r that contain d of 1 / (k + rank_r(d))        rank 1 is best, k = 60

Cormack, Clarke and Büttcher 2009 (SIGIR). Only ranks count, so scores of different scales need no tuning.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modicum.retrieve.indexes import Hits

K = 60


def reciprocal_rank(rankings: Sequence[Sequence[int]], k: float = K) -> list[tuple[int, float]]:
    """(id, score) best first. Equal scores keep the order in which ids first appear, ranking by ranking."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (k + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def fuse(results: Sequence[Hits], depth: int, k: float = K) -> Hits:
    """Fuse the rows of several `Hits` over the same queries; the best `depth` of each are kept."""
    fused = Hits.empty(len(results[0].ids_QK), depth)
    for q in range(len(fused.ids_QK)):
        best = reciprocal_rank([[i for i in r.ids_QK[q].tolist() if i >= 0] for r in results], k)[:depth]
        fused.ids_QK[q, : len(best)] = [item for item, _ in best]
        fused.scores_QK[q, : len(best)] = np.array([score for _, score in best], np.float32)
    return fused
