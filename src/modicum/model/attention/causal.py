"""causal: every query sees itself and all keys before it.

    allowed(q, k) = k <= q

Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.model.attention import ALL, NONE, SOME, AttentionPattern


@dataclass(frozen=True, kw_only=True)
class Config:
    """No knobs."""


class Causal(AttentionPattern):
    config: Config

    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return k_pos <= q_pos

    def blocks(self, q_len: int, k_len: int, size: int) -> Tensor:
        first_q = torch.arange(0, q_len, size)[:, None] + (k_len - q_len)
        last_q = (first_q + size - 1).clamp(max=k_len - 1)
        first_k = torch.arange(0, k_len, size)[None, :]
        last_k = (first_k + size - 1).clamp(max=k_len - 1)
        some = torch.where(first_k <= last_q, SOME, NONE)
        return torch.where(last_k <= first_q, ALL, some).to(torch.uint8)

    def keys_per_query(self, length: int) -> float:
        return (length + 1) / 2
