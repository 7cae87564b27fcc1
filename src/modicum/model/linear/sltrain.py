"""sltrain: a low-rank product plus a sparse matrix of fixed random support, both trained from scratch.

There is no dense weight to train and none to keep: the layer owns two thin factors and the values of a few
entries, whose places are drawn once, uniformly, and never change. The product gives the weight its large
singular directions, the scattered entries the rank that a product lacks, so that pretraining comes near dense
training with far fewer parameters, gradients and optimizer moments.

    W = s B A + S,   s = alpha / r,   S[I] = V,   |I| = density x O x I
    dB = s dY^T (X A^T),   dA = s (dY B)^T X,   dV = (dY^T X)[I],   dX = dY W

W is put together for a product and dropped; the backward pass keeps X, B, A and V, makes W again for dX, and
of dY^T X keeps the entries in I alone. One dense matrix of one layer at a time is the most that ever exists.

Start: A Kaiming uniform (a = sqrt(5)), B zero, V uniform in +-1/sqrt(I), as the paper trains. `fit` therefore
takes a weight's shape and bias and not its values: the form is for training from scratch, says so
(`fit_error` None), and is refused where a weight must be kept.

Han et al. 2024, arXiv:2406.02214, section 3, algorithm 1.
Departs from the paper: places are stored in 32 bits where they fit (its code: 64). Where no entry is stored,
which is low rank alone, zero factors in a row (value and output, up and down) would leave every gradient zero
for good, so both factors start random, alike, with B A as wide as a Kaiming layer. `start=spectral` is not
the paper's: B A starts as the best rank-r approximation of the fresh weight (Khodak et al. 2021,
arXiv:2105.01029) and V as what that misses; low rank alone depends much on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modicum.model.linear import LinearForm, LinearShape, check_rank
from modicum.model.wide import widened

CLAIM = {
    "figure": "perplexity 34.15 with 0.26 GB of parameters and optimizer state, dense 34.06 with 0.35, "
    "low rank alone 78.18 with 0.24",
    "where": "Table 2",
    "scale": "LLaMA 60M, 1.1B tokens of C4",
}
SWEEP = {"rank": (24,), "density": (0.03, 0)}


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: int = 128  # r; the paper: 128 at width 512 to 512 at width 2048, a quarter of the width
    density: float = 0.03  # the paper's delta: share of the entries stored; 0: low rank alone
    #: The product is scaled by alpha / rank. None: a quarter of the rank, which is the paper's 32 at rank 128
    #: (it takes less, 16 at rank 256 and 8 at 512, for wider layers).
    alpha: float | None = None
    start: Literal["kaiming", "spectral"] = "kaiming"  # the paper's, or from the fresh weight's SVD

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.density <= 1:
            raise ValueError(f"density={self.density} must be a fraction of the entries, from 0 to 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha} must be a positive number; None: a quarter of the rank")


TOY = Config(rank=4, density=0.1, alpha=8.0)


class SLTrain(LinearForm):
    provides = frozenset({"adapter_base", "factors", "merge", "trainable"})
    conflicts = frozenset()
    fit_error = None
    config: Config
    index: Tensor

    def __init__(self, config: Config, shape: LinearShape):
        check_rank("sltrain", config.rank, shape)
        super().__init__(config, shape)
        entries = shape.in_features * shape.out_features
        stored = int(config.density * entries)
        self.A = nn.Parameter(self._empty(config.rank, shape.in_features))
        self.B = nn.Parameter(self._empty(shape.out_features, config.rank))
        self.V = nn.Parameter(self._empty(stored), requires_grad=stored > 0)
        # Flat places o x I + i of the stored entries, ascending.
        self.register_buffer("index", self._empty(stored, dtype=index_dtype(entries)))
        if self.bias is not None:
            self.bias.requires_grad_(True)
        self.scaling = 0.25 if config.alpha is None else config.alpha / config.rank

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        """A fresh start of `weight_OI`'s shape, with its bias; `start=spectral` comes near its values."""
        entries, stored = self.in_features * self.out_features, self.V.numel()
        drawn = torch.randperm(entries, generator=generator, dtype=self.index.dtype, device="cpu")[:stored]
        self.index.copy_(drawn.sort().values)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(self.in_features)
        if self.config.start == "spectral":
            left_OI, sigma, right_II = torch.linalg.svd(weight_OI.float(), full_matrices=False)
            root_R = (sigma[: self.config.rank] / self.scaling).sqrt()
            self.B.copy_(left_OI[:, : self.config.rank] * root_R)
            self.A.copy_(root_R[:, None] * right_II[: self.config.rank])
            missed_OI = weight_OI.float() - self.scaling * (self.B @ self.A).float()
            self.V.copy_(missed_OI.flatten().index_select(0, self.index))
        elif stored:
            nn.init.zeros_(self.B)
            nn.init.uniform_(self.V, -bound, bound, generator=generator)
        else:
            # With variance v, entries of s B A have s^2 r v^2; those of a Kaiming layer have 1 / (3 I).
            wide = math.sqrt(3 * bound / (self.scaling * math.sqrt(3 * self.config.rank)))
            nn.init.uniform_(self.A, -wide, wide, generator=generator)
            nn.init.uniform_(self.B, -wide, wide, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        y: Tensor = _LowRankPlusSparse.apply(x.to(self.A.dtype), self.B, self.A, self.V, self.index, self.scaling)
        y = y.to(dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def dense(self) -> Tensor:
        return compose(self.B, self.A, self.V, self.index, self.scaling)

    def trainable(self) -> list[nn.Parameter]:
        own = [self.A, self.B] + ([self.V] if self.V.numel() else [])
        return own if self.bias is None else [*own, self.bias]


def index_dtype(entries: int) -> torch.dtype:
    return torch.int32 if entries < 2**31 else torch.int64


def compose(B_OR: Tensor, A_RI: Tensor, V_K: Tensor, index_K: Tensor, scaling: float) -> Tensor:
    """weight_OI = scaling B A + S."""
    weight_OI = (B_OR @ A_RI).mul_(scaling)
    if V_K.numel():
        weight_OI.view(-1).index_add_(0, index_K, V_K)
    return weight_OI


class _LowRankPlusSparse(torch.autograd.Function):
    """y = x W^T with no dense weight kept from forward to backward, and no dense gradient kept at all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B_OR: Tensor, A_RI: Tensor, V_K: Tensor, index_K: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, B_OR, A_RI, V_K, index_K)
        ctx.scaling = scaling
        return F.linear(x, compose(B_OR, A_RI, V_K, index_K, scaling))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B_OR, A_RI, V_K, index_K = ctx.saved_tensors
        needs_x, needs_B, needs_A, needs_V, *_ = ctx.needs_input_grad
        dy_NO, x_NI = grads[0].reshape(-1, B_OR.shape[0]), x.reshape(-1, A_RI.shape[1])
        dx = dB = dA = dV = None
        with widened(dy_NO):
            if needs_x:
                dx = (dy_NO @ compose(B_OR, A_RI, V_K, index_K, ctx.scaling)).view_as(x)
            if needs_B:
                dB = (dy_NO.T @ (x_NI @ A_RI.T)).mul_(ctx.scaling)
            if needs_A:
                dA = ((dy_NO @ B_OR).T @ x_NI).mul_(ctx.scaling)
            if needs_V:
                dV = (dy_NO.T @ x_NI).view(-1).index_select(0, index_K)
        return dx, dB, dA, dV, None, None
