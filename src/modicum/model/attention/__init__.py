"""port attention: which keys a query may see.

A pattern's truth is the elementwise predicate `allowed`; everything else must agree with it. Positions
count along one sequence from 0, and a pattern never allows a key after its query. Documents and padding are
not its business: whoever attends intersects the pattern with those.

Methods are constructed as `cls(config)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modicum.core.registry import Method

BASELINE = "causal"

NONE, SOME, ALL = 0, 1, 2  # what a block of the mask allows


class AttentionPattern(Method):
    """Base of all patterns. Override `allowed`, and the rest where a closed form is cheaper."""

    def __init__(self, config: Any):
        self.config = config

    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Bool in the broadcast shape of two integer tensors: may the query see the key?"""
        raise NotImplementedError

    def blocks(self, q_len: int, k_len: int, size: int) -> Tensor:
        """uint8 (ceil(q_len/size), ceil(k_len/size)): `NONE`, `SOME` or `ALL` of each block is allowed.

        Queries are the last `q_len` of `k_len` positions. Edge blocks count only the positions that exist.
        This default evaluates `allowed` one row of blocks at a time: size * k_len booleans of memory.
        """
        k_pos = torch.arange(k_len)
        rows = []
        for start in range(0, q_len, size):
            q_pos = torch.arange(start, min(start + size, q_len)) + (k_len - q_len)
            seen = self.allowed(q_pos[:, None], k_pos[None, :])
            parts = seen.split(size, dim=1)
            rows.append(torch.tensor([ALL if p.all() else SOME if p.any() else NONE for p in parts], dtype=torch.uint8))
        return torch.stack(rows)

    def keys_per_query(self, length: int) -> float:
        """Average number of keys a query sees in a sequence of `length` tokens (for FLOP counts)."""
        k_pos = torch.arange(length)
        return float(sum(int(self.allowed(q, k_pos).sum()) for q in k_pos)) / max(length, 1)


def block_spans(q_len: int, k_len: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(first, last) query position of each row of blocks, and (first, last) key position of each column.

    As (rows, 1) and (1, columns), to be compared with each other; queries are the last `q_len` of `k_len` positions.
    """
    first_q = torch.arange(0, q_len, size)[:, None] + (k_len - q_len)
    first_k = torch.arange(0, k_len, size)[None, :]
    last_q, last_k = ((first + size - 1).clamp(max=k_len - 1) for first in (first_q, first_k))
    return first_q, last_q, first_k, last_k
