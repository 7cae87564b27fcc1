"""For trainers that compare several candidates of a query: the labelled passage and some of its negatives.

Shape letters: B queries of a batch, K candidates of a query, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch, RetrieverTrainer


class CandidateTrainer(RetrieverTrainer):
    """A method defines `on_candidates`; `count` says how many candidates a query has in a step."""

    count: int

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.count = int(getattr(config, "candidates", 2))
        if "scores" in self.needs:
            for q, scores in enumerate(pairs.scores_Q):
                missing = [r for r in (pairs.positive_Q[q], *pairs.negatives_Q[q]) if int(r) not in scores]
                if missing:
                    raise UserError(f"passage {missing[0]} of query {q} has no score; score all negatives")

    def candidates(self, batch: Batch) -> np.ndarray:
        """rows_BK: the positive, the batch's negative, then others drawn without replacement; -1 where none is left."""
        rows_BK = np.full((len(batch.query_B), self.count), -1, np.int64)
        rng = batch.rng
        for b, (q, positive, negative) in enumerate(
            zip(batch.query_B, batch.positive_B, batch.negative_B, strict=True)
        ):
            more = [int(r) for r in rng.permutation(self.pairs.negatives_Q[q]) if r not in (positive, negative)]
            rows = [int(positive), int(negative), *more][: self.count]
            rows_BK[b, : len(rows)] = rows
        return rows_BK

    def rewards(self, batch: Batch, rows_BK: np.ndarray) -> Tensor:
        """rewards_BK, float64; -inf where there is no candidate."""
        rewards_BK = np.full(rows_BK.shape, -np.inf)
        for b, q in enumerate(batch.query_B):
            for k, row in enumerate(rows_BK[b]):
                if row >= 0:
                    rewards_BK[b, k] = self.pairs.scores_Q[q][int(row)] if "scores" in self.needs else 0.0
        return torch.from_numpy(rewards_BK)

    def query_texts(self, batch: Batch) -> list[str]:
        return [self.pairs.queries[q] for q in batch.query_B]

    def key_texts(self, rows: Sequence[int], batch: Batch) -> list[str]:
        return [self.pairs.passages[r] for r in rows]

    def loss(self, student: Student, batch: Batch) -> Tensor:
        rows_BK = self.candidates(batch)
        real_BK = torch.from_numpy(rows_BK >= 0)
        queries_BD = student(self.query_texts(batch)).pooled()
        keys_ND = student(self.key_texts(rows_BK[rows_BK >= 0].tolist(), batch)).pooled()
        keys_BKD = keys_ND.new_zeros((*rows_BK.shape, keys_ND.shape[-1]))
        keys_BKD[real_BK.to(keys_ND.device)] = keys_ND
        return self.on_candidates(queries_BD, keys_BKD, self.rewards(batch, rows_BK).to(keys_ND.device))

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        rows_BK = np.stack([batch.positive_B, batch.negative_B], 1)
        keys_BKD = torch.stack([positives_BD, negatives_BD], 1)
        return self.on_candidates(queries_BD, keys_BKD, self.rewards(batch, rows_BK).to(keys_BKD.device))

    @abstractmethod
    def on_candidates(self, queries_BD: Tensor, keys_BKD: Tensor, rewards_BK: Tensor) -> Tensor:
        """The loss; candidate 0 is the labelled passage, a reward of -inf marks a missing one."""
