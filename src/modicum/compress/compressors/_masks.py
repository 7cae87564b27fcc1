"""Which entries of a matrix are set to zero: exactly so many, or n of every m along the inputs.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Knobs of every pruner of single weights."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5  # part of the entries that become zero
    pattern: str = ""  # "2of4": two of every four inputs become zero, whatever `sparsity` is

    def __post_init__(self) -> None:
        if self.pattern and (not re.fullmatch(r"[1-9]\d*of[1-9]\d*", self.pattern) or self.zeros >= self.every):
            raise ValueError(f"pattern={self.pattern!r} must be NofM with N below M, for instance 2of4 or 4of8")

    @property
    def zeros(self) -> int:
        return int(self.pattern.split("of")[0])

    @property
    def every(self) -> int:
        return int(self.pattern.split("of")[1])


def smallest(score: Tensor, part: float) -> Tensor:
    """True at round(part n) entries of the last dimension with the least score; of equal ones the first."""
    count = round(part * score.shape[-1])
    order = score.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


def smallest_of(score_OI: Tensor, config: MaskConfig) -> Tensor:
    """True at the `zeros` least of every `every` inputs; inputs that fill no whole pattern are kept."""
    whole = score_OI.shape[1] // config.every * config.every
    mask = torch.zeros_like(score_OI, dtype=torch.bool)
    grouped = score_OI[:, :whole].unflatten(1, (-1, config.every))
    mask[:, :whole] = smallest(grouped, config.zeros / config.every).flatten(1)
    return mask
