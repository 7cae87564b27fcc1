"""sparsegpt: weights set to zero where the columns to the right can best make up for it, which they then do.

With H = 2 X X^T of a layer's inputs, damped, and U the upper Cholesky factor of its inverse, for each block of columns

    M = the p entries of least w^2 / U_jj^2 in the block,   then from left to right   q = w_j (1 - M_j),
    e = (w_j - q) / U_jj,   W_:,j+1: -= e U_j,j+1:,

which is optimal brain surgeon in the order of the columns, with all rows sharing one inverse. With a `pattern` the mask
of every m columns is chosen, n of m in each row, when the first of them is due. Frantar and Alistarh 2023,
arXiv:2301.00774, algorithm 1. Departs: the inputs of all layers of a block are those before any of its layers is
pruned; pruning and quantising in one sweep (section 3.5) is not here: compress what this writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from modicum.compress.compressors import Compressor, Statistics
from modicum.compress.compressors._masks import MaskConfig, smallest, smallest_of
from modicum.compress.compressors._sweep import factor, push


@dataclass(frozen=True, kw_only=True)
class Config(MaskConfig):
    damping: Annotated[float, Field(ge=0)] = 0.01  # of the mean of diag H, added to it
    columns: Annotated[int, Field(ge=1)] = 128  # of a block, in which the mask is chosen at once


CLAIM = {"figure": "at 50%, WikiText2 perplexity 8.21 of OPT-175B against 8.35 dense; magnitude breaks it",
         "where": "section 4", "scale": "175B parameters"}  # fmt: skip
SWEEP = ("sparsity=0.5", "pattern=2of4")


class SparseGpt(Compressor):
    requires = frozenset({"calibration_text"})
    leaves = "weights"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    config: Config

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Tensor:
        c, W = self.config, weight_OI.clone()
        exact_II, dead_I = factor(statistics.gram, c.damping)
        U_II = exact_II.to(W.dtype)
        W[:, dead_I] = 0
        scale_I = U_II.diagonal()
        step = c.columns if not c.pattern else max(c.every, c.columns // c.every * c.every)
        for start in range(0, W.shape[1], step):
            stop, errors = min(start + step, W.shape[1]), []
            mask = torch.zeros_like(W[:, start:stop], dtype=torch.bool)
            if not c.pattern:
                score = (W[:, start:stop] / scale_I[start:stop]).square()
                mask = smallest(score.flatten(), c.sparsity).view_as(score)
            for column in range(start, stop):
                i = column - start
                if c.pattern and i % c.every == 0:
                    end = min(column + c.every, stop)
                    score = (W[:, column:end] / scale_I[column:end]).square()
                    mask[:, i : i + end - column] = smallest_of(score, c)
                kept_O = W[:, column].masked_fill(mask[:, i], 0)
                errors.append(push(W, U_II, column, stop, kept_O))
            W[:, stop:] -= torch.stack(errors, 1) @ U_II[start:stop, stop:]
        return W
