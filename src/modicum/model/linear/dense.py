"""dense: the weight as it is, every entry stored and trained.

    y = x W^T + b

The baseline of the port, and the form that holds a plain layer's weight under an adapter. Attached on its
own it means full fine-tuning of the chosen layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear._module import Products


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


class Dense(LinearForm):
    provides = frozenset({"adapter_base", "embedding", "fit", "merge", "trainable"})
    config: Config

    def __init__(self, config: Config, shape: LinearShape):
        super().__init__(config, shape)
        self.weight = nn.Parameter(self._empty(shape.out_features, shape.in_features))
        if self.bias is not None:
            self.bias.requires_grad_(True)

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        self.weight.copy_(weight_OI)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        return self.weight

    def products(self) -> Products | None:
        return Products(self.weight) if self.bias is None else None

    def rows(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)

    def trainable(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]
