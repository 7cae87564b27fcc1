"""int8: keys and values in eight bits, one scale for each entry and head.

An entry is coded when it is written and by itself, so everything that acts on entries (eviction, drafts, the prefix
cache) goes on as with a plain cache, in 0.52 of its bytes at 64 dimensions.

    scale[s] = max_e |x[s, e]| / 127,   codes[s, e] = round(x[s, e] / scale[s])
    error <= scale / 2 and the rounding of the scale to bfloat16

No paper; the symmetric absmax rule that cache quantisers are compared with (as in Hooper et al. 2024,
arXiv:2401.18079, section 3). Departs: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.serve.cacheforms import CacheForm


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Int8(CacheForm):
    config: Config
    native = "int8"  # codes, and a bfloat16 scale for each entry

    def encode(self, which: str, x_PE: Tensor) -> tuple[Tensor, ...]:
        scale_P1 = (x_PE.abs().amax(-1, keepdim=True).float() / 127).to(torch.bfloat16)
        step_P1 = torch.where(scale_P1 > 0, scale_P1, 1).float()
        return (x_PE.float() / step_P1).round().clamp(-127, 127).to(torch.int8), scale_P1

    def decode(self, which: str, codes: tuple[Tensor, ...]) -> Tensor:
        return (codes[0].float() * codes[1].float()).to(self.dtype)
