"""2dmse: vectors that can be cut in layers and in dimensions.

With v^n the pooled states of layer n of N, each step draws one n < N and one d uniformly, and adds up the loss l of
the trainer `base` on four versions of the vectors, and the divergence of the shallow layer's from the last one's:

    L = l(v^N) + l(v^N[:d]) + l(v^n) + l(v^n[:d]) + weight KL( softmax(v^N / tau) || softmax(v^n / tau) )

v[:d] keeps the leading dimensions and is compared at length 1 afterwards. KL runs over the coordinates of a vector,
its target is detached. One forward pass gives all layers. The trained encoder is then opened with the knobs
`layers` and `dims`: sentence-transformers:model=FOLDER,layers=2,dims=64.

Li et al. 2024, arXiv:2402.14776 (versions 1 and 3), section 3; tau and the weight as in `Matryoshka2dLoss` of
sentence-transformers. Layers are weighted equally, as the paper has it and today's library; the authors' code divides
by 1 + n. Layer 0, the embeddings, is never drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch, RetrieverTrainer


@dataclass(frozen=True, kw_only=True)
class Config:
    base: Literal["in-batch", "margin-mse"] = "in-batch"  # the trainer whose loss is taken
    dims: tuple[int, ...] = (16, 32, 64, 128)  # those smaller than the width are drawn from
    layers: bool = True  # False: dimensions alone, Matryoshka (Kusupati et al. 2022)
    weight: Annotated[float, Field(ge=0)] = 1.0  # of the divergence
    tau: Annotated[float, Field(gt=0)] = 0.3

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims) < 1:
            raise ValueError(f"dims={self.dims} must hold numbers of dimensions, such as [32,64]")


TOY = Config(dims=(4, 8))


class TwoDimensional(RetrieverTrainer):
    config: Config
    unit = True

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.base: RetrieverTrainer = build("trainer", config.base, pairs)

    def draw(self, depth: int, width: int, batch: Batch) -> tuple[int, int]:
        """(n from 1 to N - 1, d) of a step."""
        dims = [d for d in self.config.dims if d < width]
        if depth < 2 or not dims:
            raise UserError(f"2dmse cuts layers and dims={self.config.dims}; the encoder has {depth} x {width}")
        rng = batch.rng
        return int(rng.integers(1, depth)), int(rng.choice(dims))

    def loss(self, student: Student, batch: Batch) -> Tensor:
        states = student(self.texts(batch))
        n, d = self.draw(student.depth, student.width, batch)
        last_ND, shallow_ND = states.pooled(), states.pooled(n - 1)
        versions = [last_ND, last_ND[:, :d], shallow_ND, shallow_ND[:, :d]]
        total = sum((self._part(v, batch) for v in versions[: 4 if self.config.layers else 2]), torch.zeros(()))
        if self.config.layers and self.config.weight:
            target_ND = F.softmax(last_ND.detach() / self.config.tau, dim=-1)
            logs_ND = F.log_softmax(shallow_ND / self.config.tau, dim=-1)
            total = total + self.config.weight * F.kl_div(logs_ND, target_ND, reduction="batchmean")
        return total

    def _part(self, vectors_ND: Tensor, batch: Batch) -> Tensor:
        count = len(batch.query_B)
        return self.base.on_vectors(vectors_ND[:count], vectors_ND[count : 2 * count], vectors_ND[2 * count :], batch)

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        return self.base.on_vectors(queries_BD, positives_BD, negatives_BD, batch)
