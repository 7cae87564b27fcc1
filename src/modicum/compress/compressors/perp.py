"""perp: what pruning took from each matrix's output is made up for by a low-rank update of the weights that are left.

A base method prunes (mask M, weights W_p); then, matrix by matrix, on inputs X of the model pruned so far, A and B of
MaskLoRA are trained to give back the original's output:

    min over A, B of || (W - W_p - s (B A) * M) X ||^2,    W' = W_p + s (B A) * M,    s = alpha / r

so zeros stay where they were, and what is written is a plain model of the base's sparsity. The objective needs X X^T
alone. AdamW, its rate falling linearly to 0; the best iterate is kept, which is never worse than the base on the
calibration text. Zimmer et al. 2023, arXiv:2312.15230, section 3.3 (reconstruction). Departs: fewer steps at a larger
rate, each on all calibration tokens at once; norms and biases, which retraining with the form `perp` of the port linear
trains, stay. The paper's other half, retraining the whole model on the language loss, is that form's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from modicum.compress.compressors import Compressor, Statistics
from modicum.compress.compressors._masks import MaskConfig
from modicum.core import registry
from modicum.core.choice import Choice


@dataclass(frozen=True, kw_only=True)
class Config(MaskConfig):
    base: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"  # what prunes
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    steps: Annotated[int, Field(ge=0)] = 30  # on each matrix
    rate: Annotated[float, Field(gt=0)] = 3e-3  # the first steps' learning rate; the paper: 5e-4 for many more steps


TOY = Config(rank=4, steps=5)
CLAIM = {"figure": "0.27 to 0.35% of the parameters retrained match full retraining after pruning", "where": "abstract",
         "scale": "OPT 2.7B to 30B"}  # fmt: skip
SWEEP = ("base=magnitude", "base=wanda", "base=sparsegpt")


class Perp(Compressor):
    requires = frozenset({"calibration_text"})
    leaves = "weights"
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "squares"})
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        knobs = {"sparsity": config.sparsity, "pattern": config.pattern}
        self.base: Compressor = registry.build("compressor", Choice("compressor", config.base, knobs))

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Tensor:
        pruned_OI = self.base.fit(weight_OI, statistics)
        assert isinstance(pruned_OI, Tensor)
        gram_II = (statistics.gram / max(statistics.count, 1)).to(weight_OI.dtype)
        return reconstruct(weight_OI, pruned_OI, gram_II, self.config)


def reconstruct(weight_OI: Tensor, pruned_OI: Tensor, gram_II: Tensor, config: Config) -> Tensor:
    """The pruned weight with its trained update; gram_II: E x x^T of the inputs."""
    live_OI = pruned_OI != 0
    scaling, columns = config.alpha / config.rank, weight_OI.shape[1]
    generator = torch.Generator().manual_seed(0)
    bound = 1 / math.sqrt(columns)
    A_RI = ((torch.rand(config.rank, columns, generator=generator) * 2 - 1) * bound).to(weight_OI)
    B_OR = torch.zeros(len(weight_OI), config.rank, dtype=weight_OI.dtype, device=weight_OI.device)
    optimizer = torch.optim.AdamW([A_RI, B_OR], lr=config.rate, weight_decay=0.0)
    best_OI, least, first = pruned_OI, math.inf, 0.0
    for step in range(config.steps + 1):
        now_OI = pruned_OI + (scaling * (B_OR @ A_RI)).masked_fill_(~live_OI, 0)
        missing_OI = now_OI - weight_OI
        through_OI = missing_OI @ gram_II
        loss = float((missing_OI * through_OI).sum())
        if loss < least:
            best_OI, least = now_OI, loss
        first = first or loss
        if step == config.steps or first <= 0:
            break
        # The gradient of the objective over its first value, so that matrices of all sizes train alike.
        slope_OI = (through_OI * (2 * scaling / first)).masked_fill_(~live_OI, 0)
        A_RI.grad, B_OR.grad = B_OR.T @ slope_OI, slope_OI @ A_RI.T
        optimizer.param_groups[0]["lr"] = config.rate * (1 - step / config.steps)
        optimizer.step()
    return torch.where(live_OI, best_OI, 0.0)
