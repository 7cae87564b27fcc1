"""lambda: every query sees itself, the keys just before it, and the first keys of the sequence.

    allowed(q, k) = k <= q  and  (q - k < window  or  k < sinks)

The two arms of the letter: a band along the diagonal and a column at the left. Cost per query is constant
beyond `window + sinks` tokens; without the column, models fail as soon as the first tokens leave the band.
Han et al. 2023, arXiv:2308.16137, section 3.2 (Xiao et al. 2023, arXiv:2309.17453, keep the same keys). The
paper's limit on distances is no matter of who is seen: the KV policy lm-infinite adds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.attention import ALL, NONE, SOME, AttentionPattern, block_spans


@dataclass(frozen=True, kw_only=True)
class Config:
    window: int = 4096  # latest keys a query sees, itself included
    sinks: int = 10  # first keys that every query sees

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise UserError(f"lambda: window={self.window} must be at least 1, sinks={self.sinks} at least 0")


TOY = Config(window=5, sinks=2)
SWEEP = {"window": (256,), "sinks": (4,)}  # what a bench on short sequences can tell apart


class Lambda(AttentionPattern):
    config: Config

    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & ((q_pos - k_pos < self.config.window) | (k_pos < self.config.sinks))

    def blocks(self, q_len: int, k_len: int, size: int) -> Tensor:
        window, sinks = self.config.window, self.config.sinks
        first_q, last_q, first_k, last_k = block_spans(q_len, k_len, size)
        some = (first_k <= last_q) & ((last_k > first_q - window) | (first_k < sinks))
        # All: every key is early, or the first one that is not lies in the last query's window.
        every = (last_k <= first_q) & ((last_k < sinks) | (first_k.clamp(min=sinks) > last_q - window))
        return torch.where(every, ALL, torch.where(some, SOME, NONE)).to(torch.uint8)

    def keys_per_query(self, length: int) -> float:
        most = min(self.config.window + self.config.sinks, length)
        return (most * (most + 1) / 2 + (length - most) * most) / max(length, 1)
