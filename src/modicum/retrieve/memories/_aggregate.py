"""Networks of memories: token states to an entry, entries and a question to a prefix.

Shape letters: S documents, T tokens, N vectors of an entry, W width, Q questions, M vectors that are read, P entries of
the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from modicum.retrieve.prefix import Prefix


class CrossBlock(nn.Module):
    """x + attention(norm(x), memory), then x + mlp(norm(x)); no positions, so the order of the memory says nothing."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.memory_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_QNW: Tensor, memory_QMW: Tensor, padding_QM: Tensor | None = None) -> Tensor:
        memory = self.memory_norm(memory_QMW)
        y, _ = self.attention(self.norm(x_QNW), memory, memory, key_padding_mask=padding_QM, need_weights=False)
        x_QNW = x_QNW + y
        out: Tensor = x_QNW + self.mlp(self.mlp_norm(x_QNW))
        return out


class Pooler(nn.Module):
    """Token states of a text to N vectors: learnt queries attend to them, then an MLP with a skip for each vector."""

    def __init__(self, states: int, vectors: int, width: int, heads: int):
        super().__init__()
        self.into = nn.Linear(states, width)
        self.queries_NW = nn.Parameter(torch.randn(vectors, width) / width**0.5)
        self.block = CrossBlock(width, heads)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
            for _ in range(vectors)
        )

    def forward(self, states: Sequence[np.ndarray]) -> Tensor:
        """vectors_SNW of the token states (T, states) of S texts."""
        device = self.queries_NW.device
        rows = [torch.from_numpy(np.ascontiguousarray(s, np.float32)).to(device) for s in states]
        padded_STD = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths_S = torch.tensor([len(r) for r in rows], device=device)
        padding_ST = torch.arange(padded_STD.shape[1], device=device)[None] >= lengths_S[:, None]
        x_SNW = self.queries_NW[None].expand(len(rows), -1, -1)
        x_SNW = self.block(x_SNW, self.into(padded_STD), padding_ST)
        return torch.stack([x_SNW[:, n] + mlp(x_SNW[:, n]) for n, mlp in enumerate(self.mlps)], 1)


class Aggregator(nn.Module):
    """A question's vectors read all entries by cross-attention, and are expanded to keys and values of every layer."""

    def __init__(self, width: int, blocks: int, heads: int, shapes: Sequence[tuple[int, int]], virtual: int):
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(blocks))
        self.shapes, self.virtual = list(shapes), virtual
        self.slots_MW = nn.Parameter(torch.randn(2 * len(shapes) * virtual, width) / width**0.5)
        self.expand = CrossBlock(width, heads)
        linears = [nn.Linear(width, g * e) for g, e in shapes for _ in (0, 1)]
        self.out = nn.ModuleList(linears)
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def gathered(self, question_QNW: Tensor, memory_QMW: Tensor) -> Tensor:
        """What each question read, (Q, N, W)."""
        for block in self.blocks:
            question_QNW = block(question_QNW, memory_QMW)
        return question_QNW

    def windowed(self, question_QNW: Tensor, entries_SNW: Tensor, windows: Sequence[int]) -> Tensor:
        """The same by windows of so many documents, whose results are the entries of the next reading."""
        Q = len(question_QNW)
        memory_QSNW = entries_SNW[None].expand(Q, -1, -1, -1)
        for window in windows:
            if memory_QSNW.shape[1] <= window:
                break
            parts = memory_QSNW.split(window, 1)
            memory_QSNW = torch.stack([self.gathered(question_QNW, part.flatten(1, 2)) for part in parts], 1)
        return self.gathered(question_QNW, memory_QSNW.flatten(1, 2))

    def prefix(self, read_QNW: Tensor) -> Prefix:
        slots_QMW = self.slots_MW[None].expand(len(read_QNW), -1, -1)
        x_QMW = self.expand(slots_QMW, torch.cat([slots_QMW, read_QNW], 1))
        rows = []
        for n, (part, linear) in enumerate(zip(x_QMW.split(self.virtual, 1), self.out, strict=True)):
            g, e = self.shapes[n // 2]
            rows.append(linear(part).unflatten(-1, (g, e)).transpose(1, 2))
        return Prefix(rows[0::2], rows[1::2])
