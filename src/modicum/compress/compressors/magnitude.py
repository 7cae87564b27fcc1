"""magnitude: the smallest weights set to zero.

    M = the p n entries of least |W|,   W <- W (1 - M)

in each matrix by itself (scope `matrix`), over all matrices together (`global`), or n of every m inputs of a row
(`pattern`). It reads no text and changes no other weight: the zero line of pruning. Han, Pool, Tran, Dally 2015,
arXiv:1506.02626, without the retraining after it. What is written is a plain model with zeros in it, of as many bytes
as before; stored as a bitmap and the values that are left it would take 1 + 16 (1 - p) bits per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modicum.compress.compressors import BlockJob, Compressor, Statistics
from modicum.compress.compressors._masks import MaskConfig, smallest, smallest_of


@dataclass(frozen=True, kw_only=True)
class Config(MaskConfig):
    scope: Literal["matrix", "global"] = "matrix"  # where the smallest are looked for


SWEEP = ("sparsity=0.5", "pattern=2of4")


class Magnitude(Compressor):
    leaves = "weights"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._cut: dict[str, int] = {}  # scope=global: how many of each matrix
        self._name = ""

    def begin(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        if self.config.scope == "matrix" or self.config.pattern:
            return
        names, sizes = [], []
        for name, weight_OI in weights():
            names.append(name)
            sizes.append(weight_OI.abs().flatten())
        counts = [len(s) for s in sizes]
        mask = smallest(torch.cat(sizes), self.config.sparsity)
        self._cut = {n: int(part.sum()) for n, part in zip(names, mask.split(counts), strict=True)}

    def block(self, job: BlockJob) -> None:
        for name, layer in job.linears.items():
            self._name = f"layers.{job.index}.{name}"
            job.keep(name, self.fit(layer.weight.detach(), job.statistics[name]))

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Tensor:
        size_OI = weight_OI.abs()
        if self.config.pattern:
            return weight_OI.masked_fill(smallest_of(size_OI, self.config), 0)
        count: Any = self._cut.get(self._name)
        part = self.config.sparsity if count is None else count / size_OI.numel()
        return weight_OI.masked_fill(smallest(size_OI.flatten(), part).view_as(size_OI), 0)
