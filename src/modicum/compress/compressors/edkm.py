"""edkm: weights trained through a soft assignment to the entries of a table, in memory for each value, not each weight.

Differentiable k-means (Cho, Alizadeh-Vahid, Adya, Rastegari 2021, arXiv:2108.12659): with the table c of 2^b entries

    a_ij = softmax_j(-(w_i - c_j)^2 / tau),   c_j <- sum_i a_ij w_i / sum_i a_ij   up to 3 times or until it settles,
    W'_i = sum_j a_ij c_j while training, the nearest entry afterwards.

The table goes on from step to step, detached at the start of each. eDKM (Cho et al. 2023, arXiv:2309.00964, section 2):
in 16 bits there are at most 2^16 different values, so rows of a are kept for the values that occur and a weight's bits
are its index. The gradient of one weight is g_i times the slope of its own value, plus a part that reaches it through
the table and is the same for all weights of its value:

    dL/dw_i = g_i dW'/dw (c fixed) + (sum_i g_i dW'_i/dc) dc/dw_i,

so what is kept for the backward pass is the weight in bfloat16 and a few tables. It trains block by block to the
original block's outputs (`_blockwise`), from k-means. Departs: the authors train the whole model on instructions and
shard the index over learners, and find tensors that are saved twice, which one process and one copy do not need.
tau is in units of squared weights: 0 takes (spread of the weights / 2^b)^2 / 4, since 1e-4, the default of
coremltools, suits weights of about 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.compressors._blockwise import BlockTrained, BlockTraining, TrainedWeight
from modicum.compress.compressors._palette import Indices, PaletteConfig
from modicum.compress.compressors.kmeans import clustered
from modicum.model.linear.palette import nearest

VALUES = 1 << 16  # of 16 bits


@dataclass(frozen=True, kw_only=True)
class Config(BlockTraining, PaletteConfig):
    tau: Annotated[float, Field(ge=0)] = 0.0  # temperature, in squared weights; 0: from the spread of the weights
    rounds: Annotated[int, Field(ge=1)] = 3  # updates of the table in a step, at most
    settled: Annotated[float, Field(ge=0)] = 1e-4  # relative change of the table at which they end
    rate: Annotated[float, Field(ge=0)] = 1e-4  # learning rate of weights

    @property
    def scale_rate(self) -> float:
        """Nothing but weights is trained."""
        return 0.0


CLAIM = {"figure": "LLaMA-7B from 12.6 to 2.5 GB at 3 bits, PIQA 77.7; training memory of a layer 130 times smaller",
         "where": "abstract", "scale": "7B parameters"}  # fmt: skip
TOY = Config(bits=3, epochs=1, heldout=4, rate=1e-3)
SWEEP = ("bits=3,rate=1e-3",)


class _Clustered(torch.autograd.Function):
    """(W', new table) of a weight and a table, with the gradient above for the weight."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, table_K: Tensor, tau: float, rounds: int, settled: float
    ) -> tuple[Tensor, Tensor]:
        pattern = weight.detach().bfloat16()
        present, count_U, value_U = histogram(pattern)
        ctx.save_for_backward(pattern, table_K)
        ctx.settings = (tau, rounds, settled)
        soft_U, moved_K = assign(value_U, value_U, count_U, table_K, tau, rounds, settled)
        ctx.mark_non_differentiable(moved_K)
        return _spread(soft_U.to(weight.dtype), present, pattern), moved_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = grads[0]
        pattern, table_K = ctx.saved_tensors
        present, count_U, value_U = histogram(pattern)
        index = bits_of(pattern).flatten()
        whole = torch.zeros(VALUES, dtype=value_U.dtype, device=grad.device)
        sum_U = whole.index_add_(0, index, grad.flatten().to(whole.dtype))[present]
        own_U, through_U = value_U.clone().requires_grad_(), value_U.clone().requires_grad_()
        with torch.enable_grad():
            soft_U, _ = assign(own_U, through_U, count_U, table_K, *ctx.settings)
            (by_table_U,) = torch.autograd.grad(soft_U, through_U, sum_U, retain_graph=True)
            (slope_U,) = torch.autograd.grad(soft_U.sum(), own_U)
        slope, same = (_spread(v.to(grad.dtype), present, pattern) for v in (slope_U, by_table_U / count_U))
        return grad * slope + same, None, None, None, None


def bits_of(pattern: Tensor) -> Tensor:
    """The 16 bits of bfloat16 numbers as indices."""
    return pattern.view(torch.int16).long() & (VALUES - 1)


def histogram(pattern: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of bfloat16 numbers: the bits that occur (U,), how often, and their values in float32."""
    counts = torch.bincount(bits_of(pattern).flatten(), minlength=VALUES)
    present = counts.nonzero()[:, 0]
    value_U = present.to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return present, counts[present].float(), value_U


def _spread(value_U: Tensor, present: Tensor, pattern: Tensor) -> Tensor:
    """A number for each value, as a number for each weight."""
    whole = torch.zeros(VALUES, dtype=value_U.dtype, device=value_U.device)
    whole[present] = value_U
    return whole.index_select(0, bits_of(pattern).flatten()).view(pattern.shape)


def assign(
    own_U: Tensor, value_U: Tensor, count_U: Tensor, table_K: Tensor, tau: float, rounds: int, settled: float
) -> tuple[Tensor, Tensor]:
    """(soft values of own_U, table) after updates of the table by `value_U`, each of which occurs `count_U` times.

    own_U has the values of value_U; they are apart so that a weight's own slope is told from its part in the table.
    """
    for number in range(rounds):
        start_K = table_K
        logits_UK = -(value_U[:, None] - start_K).square() / tau
        mass_UK = count_U[:, None] * logits_UK.softmax(-1)
        own_mass = mass_UK.sum(0)
        table_K = torch.where(own_mass > 0, (mass_UK * value_U[:, None]).sum(0) / own_mass.clamp_min(1e-30), start_K)
        moved = (table_K - start_K).detach().abs().max()
        if moved <= settled * start_K.detach().abs().max() or number == rounds - 1:
            break
    soft_UK = (-(own_U[:, None] - start_K).square() / tau).softmax(-1)
    return soft_UK @ table_K, table_K


class Clustering(TrainedWeight):
    """A trained weight and its tables; in evaluation `forward` gives the nearest entries."""

    tables_RK: Tensor

    def __init__(self, weight_OI: Tensor, config: Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(weight_OI.clone())
        self.register_buffer("tables_RK", clustered(weight_OI, config).tables_RK.to(weight_OI.dtype))
        self.tau = config.tau or (float(weight_OI.std()) * 2 / 2**config.bits) ** 2 / 4

    def forward(self) -> Tensor:
        if not self.training:
            return self.codes().weight(self.weight.dtype)
        c, made, tables = self.config, [], []
        for part, table_K in zip(self._parts(), self.tables_RK, strict=True):
            soft, moved_K = _Clustered.apply(part, table_K, self.tau, c.rounds, c.settled)
            made.append(soft)
            tables.append(moved_K)
        self.tables_RK = torch.stack(tables).to(self.tables_RK.dtype)
        return torch.cat(made)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.weight.split(self.config.rows or len(self.weight))

    @torch.no_grad()
    def codes(self) -> Indices:
        tables_RK = self.tables_RK.to(self.config.dtype)
        parts = [
            nearest(part.bfloat16().to(part.dtype), table_K.to(part.dtype))
            for part, table_K in zip(self._parts(), tables_RK, strict=True)
        ]
        return Indices(torch.cat(parts), tables_RK, self.config)


class Edkm(BlockTrained):
    config: Config

    def quantiser(self, weight_OI: Tensor, config: Any) -> Clustering:
        return Clustering(weight_OI, config)

    def weight_rate(self) -> float:
        return self.config.rate
