"""One ranking from several: by their scores, or by their ranks alone.

    convex            score(d) = sum over rankings r of w_r phi_r(d)     phi = (s - least) / (most - least), 0 if absent
    reciprocal rank   score(d) = sum over rankings r with d of 1 / (k + rank_r(d))         rank 1 is best, k = 60

least and most are those of the query's results in ranking r; the weights sum to 1. Bruch, Gai and Ingber 2023,
arXiv:2210.11934: a convex combination is better than reciprocal ranks within a domain and outside it, hardly depends on
how scores are normalized, and its weight needs few judged queries (`fitted`). Cormack, Clarke and Büttcher 2009 (SIGIR)
for reciprocal ranks, which use no scores.

Shape letters: R rankings, Q queries, K results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from modicum.retrieve import metrics
from modicum.retrieve.indexes import Hits

K = 60
STEPS = 10  # of the grid of weights: multiples of a tenth


def fuse(results: Sequence[Hits], depth: int, weights: Sequence[float] | None = None) -> Hits:
    """The best `depth` of the convex combination; equal weights unless given.

    Equal scores keep the order in which ids first appear, ranking by ranking.
    """
    weights = weights or [1 / len(results)] * len(results)
    phis = [normalized(hits) for hits in results]
    rows = []
    for q in range(len(results[0].ids_QK)):
        scores: dict[int, float] = {}
        for hits, phi_QK, weight in zip(results, phis, weights, strict=True):
            for item, phi in zip(hits.ids_QK[q].tolist(), phi_QK[q].tolist(), strict=True):
                if item >= 0:
                    scores[item] = scores.get(item, 0.0) + weight * phi
        rows.append(sorted(scores.items(), key=lambda pair: -pair[1]))
    return _hits(rows, depth)


def normalized(hits: Hits) -> np.ndarray:
    """phi_QK: 1 for a query's best result, 0 for its last one and for what is missing; 1 where all are equal."""
    there_QK = hits.ids_QK >= 0
    scores_QK = hits.scores_QK.astype(np.float64)
    most_Q1 = np.where(there_QK, scores_QK, -np.inf).max(1, keepdims=True, initial=-np.inf)
    least_Q1 = np.where(there_QK, scores_QK, np.inf).min(1, keepdims=True, initial=np.inf)
    span_Q1 = np.where(most_Q1 > least_Q1, most_Q1 - least_Q1, 1.0)
    above_QK = np.where(there_QK, scores_QK - np.where(there_QK, least_Q1, 0), 0.0)
    phi_QK: np.ndarray = np.where(there_QK, np.where(most_Q1 > least_Q1, above_QK / span_Q1, 1.0), 0.0)
    return phi_QK


def fitted(results: Sequence[Hits], relevant: metrics.Relevant) -> list[float]:
    """The weights of the grid with the best mean nDCG@10 on judged queries; of equals, those nearest to equal ones."""
    even = 1 / len(results)
    best, chosen = -1.0, [even] * len(results)
    for weights in sorted(_grid(len(results)), key=lambda w: sum((x - even) ** 2 for x in w)):
        value = float(metrics.ndcgs(fuse(results, 10, weights).ids_QK, relevant).mean())
        if value > best + 1e-9:
            best, chosen = value, weights
    return chosen


def _grid(parts: int, left: int = STEPS) -> Iterator[list[float]]:
    if parts == 1:
        yield [left / STEPS]
        return
    for first in range(left + 1):
        yield from ([first / STEPS, *rest] for rest in _grid(parts - 1, left - first))


def reciprocal_rank(rankings: Sequence[Sequence[int]], k: float = K) -> list[tuple[int, float]]:
    """(id, score) best first. Equal scores keep the order in which ids first appear, ranking by ranking."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (k + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def fuse_ranks(results: Sequence[Hits], depth: int, k: float = K) -> Hits:
    """The best `depth` by reciprocal ranks."""
    queries = range(len(results[0].ids_QK))
    lists = ([[i for i in hits.ids_QK[q].tolist() if i >= 0] for hits in results] for q in queries)
    return _hits((reciprocal_rank(rankings, k) for rankings in lists), depth)


def _hits(rows: Iterable[list[tuple[int, float]]], depth: int) -> Hits:
    rows = list(rows)
    fused = Hits.empty(len(rows), depth)
    for q, best in enumerate(rows):
        best = best[:depth]
        fused.ids_QK[q, : len(best)] = [item for item, _ in best]
        fused.scores_QK[q, : len(best)] = np.array([score for _, score in best], np.float32)
    return fused
