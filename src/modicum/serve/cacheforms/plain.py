"""plain: keys and values as they are computed, in the cache's dtype.

    codes = x,   2 bytes a number in bfloat16

No paper. What every other form is measured against; greedy tokens are those of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from modicum.serve.cacheforms import CacheForm


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Plain(CacheForm):
    config: Config
    native = "plain"

    def encode(self, which: str, x_PE: Tensor) -> tuple[Tensor, ...]:
        return (x_PE.to(self.dtype),)

    def decode(self, which: str, codes: tuple[Tensor, ...]) -> Tensor:
        return codes[0]
