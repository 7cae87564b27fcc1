"""Ranking metrics and their standard errors.

Shape letters: Q queries, K results. `relevant[q]` maps a document's id to its grade (above 0 counts).

    RR@k     = 1 / rank of the first relevant result, 0 if none is among the first k
    recall@k = relevant results among the first k / relevant documents
    nDCG@k   = DCG / ideal DCG,   DCG = sum over ranks i <= k of grade_i / log2(i + 1)

Järvelin and Kekäläinen 2002 with linear gain, as trec_eval computes ndcg_cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Relevant = Sequence[Mapping[int, float]]


def grades(ids_QK: np.ndarray, relevant: Relevant) -> np.ndarray:
    """grades_QK (float64) of the results; 0 for missing results (id -1) and for unjudged documents."""
    return np.array(
        [
            [judged.get(i, 0.0) if i >= 0 else 0.0 for i in row]
            for row, judged in zip(ids_QK.tolist(), relevant, strict=True)
        ]
    ).reshape(ids_QK.shape)


def reciprocal_ranks(ids_QK: np.ndarray, relevant: Relevant, k: int = 10) -> np.ndarray:
    """RR@k per query, shape (Q,)."""
    hit_QK = grades(ids_QK[:, :k], relevant) > 0
    return np.where(hit_QK.any(axis=1), 1 / (hit_QK.argmax(axis=1) + 1), 0.0)


def recalls(ids_QK: np.ndarray, relevant: Relevant, k: int) -> np.ndarray:
    """recall@k per query, shape (Q,); 0 for a query without a relevant document."""
    wanted_Q = np.array([sum(g > 0 for g in judged.values()) for judged in relevant], float)
    return (grades(ids_QK[:, :k], relevant) > 0).sum(axis=1) / np.maximum(wanted_Q, 1)


def ndcgs(ids_QK: np.ndarray, relevant: Relevant, k: int = 10) -> np.ndarray:
    """nDCG@k per query, shape (Q,); 0 for a query without a relevant document."""
    gain_QK = grades(ids_QK[:, :k], relevant)
    discount = 1 / np.log2(np.arange(2, max(k, gain_QK.shape[1]) + 2))
    best = [sorted((g for g in judged.values() if g > 0), reverse=True)[:k] for judged in relevant]
    ideal_Q = np.array([np.dot(grades, discount[: len(grades)]) for grades in best], float)
    return np.divide(gain_QK @ discount[: gain_QK.shape[1]], ideal_Q, out=np.zeros(len(gain_QK)), where=ideal_Q > 0)


def bootstrap_error(values_Q: np.ndarray, samples: int = 1000, seed: int = 0) -> float:
    """Standard error of the mean: deviation of the means of `samples` resamples of the queries (Efron 1979)."""
    if len(values_Q) < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    means = [values_Q[rng.integers(0, len(values_Q), len(values_Q))].mean() for _ in range(samples)]
    return float(np.std(means, ddof=1))


def summarize(
    ids_QK: np.ndarray,
    relevant: Relevant,
    *,
    mrr: Sequence[int] = (10,),
    recall: Sequence[int] = (1, 5, 10),
    ndcg: Sequence[int] = (10,),
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """{"mrr@10": {"mean", "error"}, ...} over the queries; `error` is the bootstrap standard error."""
    values = {f"mrr@{k}": reciprocal_ranks(ids_QK, relevant, k) for k in mrr}
    values |= {f"recall@{k}": recalls(ids_QK, relevant, k) for k in recall}
    values |= {f"ndcg@{k}": ndcgs(ids_QK, relevant, k) for k in ndcg}
    return {
        name: {"mean": float(v.mean()) if len(v) else float("nan"), "error": bootstrap_error(v, seed=seed)}
        for name, v in values.items()
    }
