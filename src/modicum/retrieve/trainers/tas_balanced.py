"""tas-balanced: batches of one topic with balanced margins, taught by two teachers.

Queries are clustered once by their vectors. A batch takes one cluster, drawn uniformly whatever its size, and another
where the first has too few queries, so it is topically homogeneous and its other passages are informative. For each
query the margins of its scored pairs are cut into `bins` of equal width between its own smallest and largest; a
non-empty bin is drawn uniformly, then a pair in it. With T the pairwise teacher and T' a late-interaction one:

    L = L_pair + weight/2 ( mean over i != j of ((s(q_i, p_i) - s(q_i, p_j)) - (T'(q_i, p_i) - T'(q_i, p_j)))^2
                          + the same with n_j in place of p_j )                          L_pair as in margin-mse

Hofstätter et al. 2021, arXiv:2104.06967, sections 3 and 4, with the authors' code for what the paper leaves open. No
labels enter. Departs as margin-mse does in the scale of scores; `late_scale` multiplies T'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch
from modicum.retrieve.trainers.margin_mse import Config as MarginConfig
from modicum.retrieve.trainers.margin_mse import MarginMSE as _MarginMSE


@dataclass(frozen=True, kw_only=True)
class Config(MarginConfig):
    bins: Annotated[int, Field(ge=1)] = 10  # of a query's margins; 1: pairs are drawn uniformly
    queries_per_cluster: Annotated[float, Field(gt=0)] = 40.0
    clusters: bool = True  # False: batches are drawn from all queries
    weight: Annotated[float, Field(ge=0)] = 0.75  # of the in-batch term
    late_scale: Annotated[float, Field(gt=0)] = 1.0


class TASBalanced(_MarginMSE):
    config: Config
    needs = frozenset({"scores", "late"})

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        usable = [q for q in range(len(pairs.queries)) if len(pairs.negatives_Q[q]) > 1]
        self.clusters = [np.array(usable, np.int64)]

    def prepare(self, student: Student) -> None:
        if not self.config.clusters:
            return
        import faiss

        queries = self.clusters[0]
        vectors_ND = student.encode([self.pairs.queries[q] for q in queries])
        count = max(1, round(len(queries) / self.config.queries_per_cluster))
        kmeans = faiss.Kmeans(vectors_ND.shape[1], count, niter=20, seed=1, min_points_per_centroid=1)
        kmeans.train(vectors_ND)
        nearest_N = kmeans.index.search(vectors_ND, 1)[1][:, 0]
        self.clusters = [queries[nearest_N == c] for c in range(count) if (nearest_N == c).any()]

    def batch(self, step: int, size: int, seed: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        chosen: list[int] = []
        for c in rng.permutation(len(self.clusters)):
            queries = self.clusters[c]
            chosen += rng.permutation(queries)[: size - len(chosen)].tolist()
            if len(chosen) == size:
                break
        return self.drawn(chosen, [self.pair(q, rng) for q in chosen], seed, step)

    def pair(self, q: int, rng: np.random.Generator) -> int:
        """A negative of query q: a bin of margins drawn uniformly, then a pair in it."""
        scores, negatives = self.pairs.scores_Q[q], self.pairs.negatives_Q[q]
        margin_N = scores[int(self.pairs.positive_Q[q])] - np.array([scores[int(n)] for n in negatives])
        bin_N = bins_of(margin_N, self.config.bins)
        return int(rng.choice(negatives[bin_N == rng.choice(np.unique(bin_N))]))

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        loss = super().on_vectors(queries_BD, positives_BD, negatives_BD, batch)
        if not self.config.weight or len(queries_BD) < 2 or self.pairs.late is None:
            return loss
        rows_P = np.concatenate([batch.positive_B, batch.negative_B])
        taught_BP = self.config.late_scale * torch.from_numpy(self.pairs.late(batch.query_B, rows_P))
        scores_BP = self.scaled(queries_BD) @ self.scaled(torch.cat([positives_BD, negatives_BD])).T
        return loss + self.config.weight * in_batch_margins(scores_BP, taught_BP.to(scores_BP))


def bins_of(margin_N: np.ndarray, bins: int) -> np.ndarray:
    """The bin of every margin: equal widths between the smallest and the largest."""
    low, high = margin_N.min(), margin_N.max()
    if high <= low:
        return np.zeros(len(margin_N), np.int64)
    return np.minimum((bins * (margin_N - low) / (high - low)).astype(np.int64), bins - 1)


def in_batch_margins(scores_BP: Tensor, taught_BP: Tensor) -> Tensor:
    """Half the sum of the two means; columns are B positives, then B negatives. The diagonal is the pairwise term's."""
    count = len(scores_BP)
    own_B1, taught_B1 = scores_BP.diagonal()[:, None], taught_BP.diagonal()[:, None]
    error_BP = ((own_B1 - scores_BP) - (taught_B1 - taught_BP)).pow(2)
    off_BB = ~torch.eye(count, dtype=torch.bool, device=scores_BP.device)
    return 0.5 * (error_BP[:, :count][off_BB].mean() + error_BP[:, count:][off_BB].mean())
