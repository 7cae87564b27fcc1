"""lora: a frozen weight plus a trained low-rank update.

Only A and B train; B starts at zero, so the adapted layer starts as the layer it adapts, and the update can
be merged into the weight afterwards.

    y = base(x) + s B A dropout(x),   A in R^{r x I},  B in R^{O x r},
    s = alpha / r   (rslora: s = alpha / sqrt(r), so that the update's scale does not shrink with the rank)

Hu et al. 2021, arXiv:2106.09685, section 4.1; rslora: Kalajdzievski 2023, arXiv:2312.03732.
Departs from the paper: A starts from the Kaiming uniform distribution with a = sqrt(5), as in the authors'
released code and in peft, where the paper says Gaussian. The base may be any form that passes gradients
through, a quantised one included (Dettmers et al. 2023, arXiv:2305.14314, train so over 4-bit weights).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.model.linear import LinearForm, LinearShape, check_rank
from modicum.model.linear._adapter import Adapter
from modicum.model.linear._module import Products

CLAIM = {
    "figure": "on par with or better than full fine-tuning with 10,000x fewer trained parameters",
    "where": "abstract and Table 4",
    "scale": "GPT-3 175B",
}
SWEEP = {"rank": (2, 8)}


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # on the input of the update, while training
    rslora: bool = False


TOY = Config(rank=4, alpha=8.0)


class Lora(Adapter):
    provides = frozenset({"adapter", "factors", "fit", "merge", "trainable"})
    config: Config

    def __init__(self, config: Config, shape: LinearShape, base: LinearForm):
        check_rank("lora", config.rank, shape)
        super().__init__(config, shape, base)
        self.A = nn.Parameter(self._empty(config.rank, shape.in_features))
        self.B = nn.Parameter(self._empty(shape.out_features, config.rank))
        self.scaling = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x = F.dropout(x.to(self.A.dtype), self.config.dropout, self.training)
        return y + (self.scaling * F.linear(F.linear(x, self.A), self.B)).to(y.dtype)

    def products(self) -> Products | None:
        base = self.base.products()
        if base is None or base.down_RI is not None or (self.training and self.config.dropout):
            return None
        return Products(base.weight_OI, self.A, self.B, self.scaling)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, self.scaling

    def trainable(self) -> list[nn.Parameter]:
        return [self.A, self.B]
