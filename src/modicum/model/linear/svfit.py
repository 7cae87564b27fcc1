"""svfit: of a frozen weight, only the largest singular values train.

The weight is taken apart once, W = U diag(sigma) V^T. The subspaces stay as pretraining left them, and training
rescales the r strongest of them: r numbers for a whole matrix. What lies outside them never changes.

    y = x W_e^T + ((x V_r) * sigma_r) U_r^T,    sigma_r in R^r trained,   W_e = W - U_r diag(sigma_r) V_r^T frozen
      = base(x) + ((x V_r) * delta) U_r^T,      delta = sigma_r - sigma_r(pretrained), zero at the start

The second line is what is computed: it leaves the frozen weight whole in its base, which may be quantised, and keeps
small changes of large singular values exact in bf16. It is a low-rank update, so it merges and passes for LoRA.

Sun et al. 2024, arXiv:2409.05926, section III.
Departs from the paper: weight decay pulls delta, not sigma, to zero. The paper names r for each model; by default
all min(I, O) singular values train here, which for square matrices is the parameter count of its comparison with LoRA
(16 times fewer than rank 8 has at width 768).
Costs: the singular vectors are stored, r (I + O) frozen values, and the decomposition of a matrix takes
O(I O min(I, O)) once, when the form is attached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear._adapter import Adapter

CLAIM = {
    "figure": "better than LoRA with 16x fewer trained parameters",
    "where": "abstract; GLUE",
    "scale": "RoBERTa 125M and 355M",
}
SWEEP = {"rank": (32, 0)}


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: Annotated[int, Field(ge=0)] = 0  # singular values that train, the largest first; 0: all of them


class SVFit(Adapter):
    provides = frozenset({"adapter", "fit", "merge", "trainable"})
    config: Config

    def __init__(self, config: Config, shape: LinearShape, base: LinearForm):
        most = min(shape.in_features, shape.out_features)
        if config.rank > most:
            raise UserError(
                f"svfit: rank={config.rank} is larger than the matrix {shape.out_features} x "
                f"{shape.in_features}; give rank <= {most}, or 0 for all its singular values"
            )
        super().__init__(config, shape, base)
        rank = config.rank or most
        # Frozen parameters, not buffers: they follow from the weight, so checkpoints leave them out.
        self.V = nn.Parameter(self._empty(rank, shape.in_features), requires_grad=False)
        self.U = nn.Parameter(self._empty(shape.out_features, rank), requires_grad=False)
        self.delta = nn.Parameter(self._empty(rank))

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        exact = torch.promote_types(weight_OI.dtype, torch.float32)
        u_OM, _, v_MI = torch.linalg.svd(weight_OI.to(exact), full_matrices=False)
        rank = len(self.delta)
        self.U.copy_(u_OM[:, :rank])
        self.V.copy_(v_MI[:rank])
        nn.init.zeros_(self.delta)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x = x.to(self.V.dtype)
        return y + F.linear(F.linear(x, self.V) * self.delta.to(x.dtype), self.U).to(y.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.V, self.U * self.delta, 1.0

    def trainable(self) -> list[nn.Parameter]:
        return [self.delta]
