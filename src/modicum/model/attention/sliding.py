"""sliding: every query sees itself and the keys just before it, `window` of them in all.

    allowed(q, k) = q - window < k <= q

Cost per query and cache are constant beyond `window` tokens; through L layers a token still reaches back
L * (window - 1) positions. Beltagy et al. 2020, arXiv:2004.05150, section 3.1 (causal, as in Jiang et al.
2023, arXiv:2310.06825, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.attention import ALL, NONE, SOME, AttentionPattern, block_spans


@dataclass(frozen=True, kw_only=True)
class Config:
    window: int = 4096  # keys a query sees, itself included

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"sliding: window={self.window} must be at least 1")


TOY = Config(window=5)
SWEEP = {"window": (256,)}  # what a bench on short sequences can tell apart


class Sliding(AttentionPattern):
    config: Config

    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & (q_pos - k_pos < self.config.window)

    def blocks(self, q_len: int, k_len: int, size: int) -> Tensor:
        window = self.config.window
        first_q, last_q, first_k, last_k = block_spans(q_len, k_len, size)
        some = torch.where((first_k <= last_q) & (last_k > first_q - window), SOME, NONE)
        return torch.where((last_k <= first_q) & (first_k > last_q - window), ALL, some).to(torch.uint8)

    def keys_per_query(self, length: int) -> float:
        w = min(self.config.window, length)
        return (w * (w + 1) / 2 + (length - w) * w) / max(length, 1)
