"""lowrank: a weight as the product of two thin factors, from its truncated SVD.

    W = U S V^T,   B = U_r sqrt(S_r),  A = sqrt(S_r) V_r^T,   y = (x A^T) B^T + b,
    r = floor(I O / (ratio (I + O)))

so that the factors have 1 / ratio of the weight's numbers, and a product that much fewer FLOPs. At ratio 2 a square
matrix keeps a quarter of its rank, which ruins a narrow model until it is trained: the distiller `pela` does both. Peer
of that method; no paper of its own (Eckart and Young 1936: no product of that rank is nearer to W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.model.linear import LinearForm, LinearShape

NOT_MEASURABLE = "untrained it ruins a narrow model; it is trained by distiller pela"


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: Annotated[float, Field(gt=0)] = 2.0  # numbers of the weight to those of its factors


class LowRank(LinearForm):
    provides = frozenset({"adapter_base", "factors", "fit", "merge", "trainable"})
    fit_error = 1.0  # whatever lies outside the r largest directions
    config: Config

    def __init__(self, config: Config, shape: LinearShape):
        super().__init__(config, shape)
        rank = rank_of(config.ratio, shape.out_features, shape.in_features)
        self.A = nn.Parameter(self._empty(rank, shape.in_features))
        self.B = nn.Parameter(self._empty(shape.out_features, rank))
        if self.bias is not None:
            self.bias.requires_grad_(True)

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        left_OR, size_R, right_RI = torch.linalg.svd(weight_OI.float(), full_matrices=False)
        rank = len(self.A)
        root_R = size_R[:rank].sqrt()
        self.A.copy_(root_R[:, None] * right_RI[:rank])
        self.B.copy_(left_OR[:, :rank] * root_R)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype), bias)

    def dense(self) -> Tensor:
        return self.B @ self.A

    def trainable(self) -> list[nn.Parameter]:
        return [self.A, self.B] if self.bias is None else [self.A, self.B, self.bias]


def rank_of(ratio: float, outputs: int, inputs: int) -> int:
    """At least 1, at most the full rank."""
    return max(1, min(int(inputs * outputs / (ratio * (inputs + outputs))), inputs, outputs))
