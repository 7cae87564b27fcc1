"""gptq: weights rounded column by column, the columns to the right making up for each rounding.

With H = 2 X X^T of a layer's inputs, damped by lambda mean(diag H), and U the upper Cholesky factor of its inverse,
from left to right

    q = round(w_j) on the group's grid,   e = (w_j - q) / U_jj,   W_:,j+1: -= e U_j,j+1:,

which is the least error ||(W - Q) X|| that the columns to come can restore (optimal brain surgeon). A group's grid
comes from its weights as they are when its first column is due. With `order`, columns go by falling diag H and all
grids are fixed before, so that no permutation is stored. Columns beyond the group are updated group by group.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1 and section 4 (groups). Departs: the
inputs of all layers of a block are those before any of its layers is rounded, while the blocks before it are rounded;
the sweep is in float32 with the factor found in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from modicum.compress.compressors import Codes, Compressor, Statistics
from modicum.compress.compressors._affine import AffineConfig, Grid, grid, groups, width
from modicum.compress.compressors._sweep import factor, push


@dataclass(frozen=True, kw_only=True)
class Config(AffineConfig):
    damping: Annotated[float, Field(ge=0)] = 0.01  # of the mean of diag H, added to it
    order: bool = False  # columns by falling diag H, on grids fixed before


CLAIM = {"figure": "at 3 bits, WikiText2 perplexity 8.68 of OPT-175B against 8.34 in fp16; round-to-nearest breaks it",
         "where": "section 4", "scale": "175B parameters"}  # fmt: skip
SWEEP = ("bits=2,group=64", "bits=3,group=64")


class Gptq(Compressor):
    requires = frozenset({"calibration_text"})
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    config: Config

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Codes:
        U_II, dead_I = factor(statistics.gram, self.config.damping)
        return sweep(weight_OI.clone(), statistics.gram.diagonal(), U_II, dead_I, self.config)


def sweep(weight_OI: Tensor, importance_I: Tensor, U_II: Tensor, dead_I: Tensor, config: Config) -> Codes:
    """The codes of a weight, which is overwritten."""
    inputs, group = weight_OI.shape[1], width(config, weight_OI.shape[1])
    weight_OI[:, dead_I] = 0
    grids = _split(grid(groups(weight_OI, group), config)) if config.order else []
    order_I = torch.arange(inputs, device=weight_OI.device)
    if config.order:
        order_I = importance_I.argsort(descending=True, stable=True)
        weight_OI = weight_OI[:, order_I]
        inverse = U_II.T @ U_II
        U_II = torch.linalg.cholesky(inverse[order_I][:, order_I], upper=True)
    U_II = U_II.to(weight_OI.dtype)
    codes_OI = torch.empty_like(weight_OI)
    for start in range(0, inputs, group):
        stop, errors = min(start + group, inputs), []
        if not config.order:
            grids.append(grid(weight_OI[:, start:stop], config))
        for column in range(start, stop):
            own = grids[int(order_I[column]) // group]
            codes_O1 = own.codes(weight_OI[:, column : column + 1])
            codes_OI[:, order_I[column]] = codes_O1[:, 0]
            errors.append(push(weight_OI, U_II, column, stop, own.decode(codes_O1)[:, 0]))
        weight_OI[:, stop:] -= torch.stack(errors, 1) @ U_II[start:stop, stop:]
    scale_OG, zero_OG = (torch.cat([getattr(g, name) for g in grids], 1) for name in ("scale", "zero"))
    return Codes.of(codes_OI, scale_OG, zero_OG, config)


def _split(whole: Grid) -> list[Grid]:
    """A grid (O, G, 1) as one (O, 1) for each group."""
    return [Grid(s, z, whole.config) for s, z in zip(whole.scale.unbind(1), whole.zero.unbind(1), strict=True)]
