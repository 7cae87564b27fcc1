"""Drafted trees in a step: who sees whom, attention of many trees, and putting accepted keys in order.

Shapes: as in `serve.attend`, and X = 1 + N row places of a tree: the last known token, then its N nodes.

A tree's tokens take the X places after a sequence's cached tokens, in the tree's own order; their positions are those
of their depths. Place i sees the cached tokens and its ancestors, both within the layer's window. Afterwards the keys
and values of the accepted branch are moved to the front places, which is where a sequence without drafts has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from modicum.model.attend import attention
from modicum.serve.drafters import Tree, layout
from modicum.serve.pages import Storage

if TYPE_CHECKING:
    from modicum.serve.attend import StepAttend
    from modicum.serve.work import Work


def child(tree: Tree, place: int, token: int) -> int:
    """The place below `place` that holds `token`; 0 if there is none."""
    found = np.flatnonzero((tree.parents_N == place - 1) & (tree.tokens_N == token))
    return int(found[0]) + 1 if len(found) else 0


@dataclass(slots=True)
class _Group:
    """Trees of one size over caches of similar length, at row places first .. last - 1."""

    first: int
    last: int
    slots_B: np.ndarray
    starts_B: np.ndarray
    depth_BX: np.ndarray
    sees_BXX: np.ndarray


class TreeAttend:
    """Attention of a step's trees: a group of B is one call, (G, B, R * X, E) queries on (G, B, S, E) keys.

    A tree alone is (G, R, X, E) on (G, 1, S, E), read in place if its blocks lie side by side.
    """

    def __init__(self, step: StepAttend, works: Sequence[Work]):
        self._step, self.storage = step, step.storage
        self.first, self.last = works[0].at, works[-1].at + works[-1].n
        self._groups = [self._group(some) for some in self._split(works)]
        self._reaches: dict[tuple[int, int | None, torch.dtype], tuple[slice | Tensor, slice, Tensor]] = {}

    def _split(self, works: Sequence[Work]) -> list[list[Work]]:
        """Neighbours of one size whose numbers of blocks are within a factor of two, or eight blocks."""
        groups: list[list[Work]] = []
        limit = -1
        for w in works:
            blocks = w.start // self.storage.block_size + 1
            if not groups or groups[-1][0].n != w.n or blocks > limit:
                groups.append([])
                limit = max(2 * blocks, blocks + 8)
            groups[-1].append(w)
        return groups

    def _group(self, works: list[Work]) -> _Group:
        layouts = [layout(w.tree) for w in works if w.tree is not None]
        return _Group(
            works[0].at,
            works[-1].at + works[-1].n,
            np.array([w.sample.slot for w in works]),
            np.array([w.start for w in works]),
            np.stack([one.depth_X for one in layouts]),
            np.stack([one.sees_XX for one in layouts]),
        )

    def __call__(self, layer: int, q_GRTE: Tensor, window: int | None, scale: float, softcap: float | None) -> Tensor:
        """Queries of the trees' row places; returns out_TGRE."""
        outs = []
        for i, group in enumerate(self._groups):
            B, X = group.depth_BX.shape
            key = (i, window, q_GRTE.dtype)
            if key not in self._reaches:
                reach = self._alone if B == 1 else self._together
                self._reaches[key] = reach(group, window, q_GRTE)
            blocks, span, mask = self._reaches[key]
            k_GBSE, v_GBSE = (
                self._step._read(x[layer], blocks, B)[:, :, span].to(q_GRTE.dtype)
                for x in (self.storage.k_LGNPE, self.storage.v_LGNPE)
            )
            some_GRTE = q_GRTE[:, :, group.first - self.first : group.last - self.first]
            if B == 1:  # the query heads of a KV head as heads, its keys the same for all of them
                R = q_GRTE.shape[1]
                k_GRSE, v_GRSE = k_GBSE.expand(-1, R, -1, -1), v_GBSE.expand(-1, R, -1, -1)
                out_GRTE = attention(some_GRTE, k_GRSE, v_GRSE, scale=scale, softcap=softcap, mask=mask)
                outs.append(out_GRTE.permute(2, 0, 1, 3))
                continue
            q_GBQE = some_GRTE.unflatten(2, (B, X)).transpose(1, 2).flatten(2, 3)  # Q = R * X
            out_GBQE = attention(q_GBQE, k_GBSE, v_GBSE, scale=scale, softcap=softcap, mask=mask)
            outs.append(out_GBQE.unflatten(2, (-1, X)).permute(1, 3, 0, 2, 4).flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _alone(self, group: _Group, window: int | None, q_GRTE: Tensor) -> tuple[slice | Tensor, slice, Tensor]:
        """Of a single tree: blocks, the range of entries within them, and the additive mask (1, 1, X, S)."""
        P, X, start = self.storage.block_size, group.depth_BX.shape[1], int(group.starts_B[0])
        low = 0 if window is None else max(0, start + 1 - window)
        first = low // P
        mask_XS = torch.zeros((X, start + X - low), dtype=q_GRTE.dtype, device=q_GRTE.device)
        mask_XS[:, start - low :].masked_fill_(_hidden(group, window)[0].to(mask_XS.device), float("-inf"))
        if window is not None:
            last_X1 = torch.from_numpy(start + group.depth_BX[0] - window)[:, None].to(mask_XS.device)
            cached = torch.arange(low, start, device=mask_XS.device)
            mask_XS[:, : start - low].masked_fill_(cached <= last_X1, float("-inf"))
        blocks = self._step._blocks(int(group.slots_B[0]), first, -(-(start + X) // P))
        return blocks, slice(low - first * P, start + X - first * P), mask_XS[None, None]

    def _together(self, group: _Group, window: int | None, q_GRTE: Tensor) -> tuple[slice | Tensor, slice, Tensor]:
        """Of several trees: blocks, all entries within them, and the additive mask (1, B, R * X, S)."""
        P, device, table = self.storage.block_size, self.storage.device, self._step.table
        B, X = group.depth_BX.shape
        starts_B = group.starts_B
        low_B = np.zeros_like(starts_B) if window is None else np.maximum(0, starts_B + 1 - window)
        first_B = low_B // P
        width = int((-(-(starts_B + X) // P) - first_B).max())
        columns_BN = np.minimum(first_B[:, None] + np.arange(width), table.shape[1] - 1)
        blocks = torch.from_numpy(table[group.slots_B[:, None], columns_BN].ravel()).to(device)
        place_BS = first_B[:, None] * P + np.arange(width * P)
        hidden_BXS = np.broadcast_to((place_BS >= starts_B[:, None])[:, None], (B, X, width * P)).copy()
        if window is not None:
            position_BX = starts_B[:, None] + group.depth_BX
            hidden_BXS |= place_BS[:, None] <= position_BX[:, :, None] - window
        hidden_BXX = _hidden(group, window).numpy()
        for b, at in enumerate(starts_B - first_B * P):
            hidden_BXS[b, :, at : at + X] = hidden_BXX[b]
        mask_BXS = torch.zeros(hidden_BXS.shape, dtype=q_GRTE.dtype, device=device)
        mask_BXS.masked_fill_(torch.from_numpy(hidden_BXS).to(device), float("-inf"))
        mask = mask_BXS[None, :, None].expand(-1, -1, q_GRTE.shape[1], -1, -1).flatten(2, 3)
        return blocks, slice(None), mask


def _hidden(group: _Group, window: int | None) -> Tensor:
    """Which places of its own tree each place does not see, (B, X, X)."""
    sees_BXX = group.sees_BXX
    if window is not None:
        sees_BXX = sees_BXX & (group.depth_BX[:, None] > group.depth_BX[:, :, None] - window)
    return torch.from_numpy(~sees_BXX)


def move(storage: Storage, source: Tensor, target: Tensor) -> None:
    """Keys and values of the flat places `source` to `target`, in all layers and heads."""
    for x_LGNPE in (storage.k_LGNPE, storage.v_LGNPE):
        x_LGSE = x_LGNPE.flatten(2, 3)
        x_LGSE.index_copy_(2, target, x_LGSE.index_select(2, source))
