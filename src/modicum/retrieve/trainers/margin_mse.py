"""margin-mse: the student's margin between two passages is the teacher's.

    L = mean ( (s(q, p) - s(q, n)) - (T(q, p) - T(q, n)) )^2

Only differences of scores of one query enter, so teacher and student may differ in architecture and by an offset; not
in scale: s is an unbounded inner product, vectors keep their length. There are no labels: a negative that the teacher
prefers has a negative margin and stays. Negatives are those of the pairs, one for each query and step.

Hofstätter et al. 2020, arXiv:2010.02666, section 3; the loss is `MarginMSELoss` of sentence-transformers. Of several
teachers the mean of their scores counts (`pairs.read_scores`). Departs: s is divided by the square root of the width,
so that a small raw encoder begins at margins of the order of the teacher's; `teacher_scale` multiplies T. A raw
encoder's inner products are dominated by what all texts have in common; `cosine=20` compares cosines, 20 times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.trainers import Batch, RetrieverTrainer


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher_scale: Annotated[float, Field(gt=0)] = 1.0  # margins that vectors of this width can reach
    cosine: Annotated[float, Field(ge=0)] = 0.0  # 0: inner products, as published; else scores are this many cosines


class MarginMSE(RetrieverTrainer):
    config: Config
    needs = frozenset({"scores"})

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.unit = bool(config.cosine)
        for q, scores in enumerate(pairs.scores_Q):
            missing = [r for r in (pairs.positive_Q[q], *pairs.negatives_Q[q]) if int(r) not in scores]
            if missing:
                raise UserError(f"passage {missing[0]} of query {q} has no teacher score; score all negatives")

    def margins(self, batch: Batch) -> np.ndarray:
        """The teacher's margins_B."""
        rows = zip(batch.query_B, batch.positive_B, batch.negative_B, strict=True)
        scores = self.pairs.scores_Q
        return self.config.teacher_scale * np.array([scores[q][int(p)] - scores[q][int(n)] for q, p, n in rows])

    def scaled(self, vectors_BD: Tensor) -> Tensor:
        """Vectors whose inner products are the scores."""
        if self.config.cosine:
            return self.config.cosine**0.5 * F.normalize(vectors_BD, dim=-1)
        return vectors_BD * vectors_BD.shape[-1] ** -0.25

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        queries_BD, positives_BD, negatives_BD = map(self.scaled, (queries_BD, positives_BD, negatives_BD))
        margin_B = (queries_BD * (positives_BD - negatives_BD)).sum(-1)
        return (
            (margin_B - torch.as_tensor(self.margins(batch), dtype=margin_B.dtype, device=margin_B.device))
            .pow(2)
            .mean()
        )
