"""Attention over a plan's segments as plain PyTorch calls, for the backends that run the decoder as it is written.

Shapes: T rows of a segment, B sequences, L layers, H query heads, G KV heads, R = H / G, S keys, X all rows of a
segment (B T), N blocks or pages of a sequence, P block_size, E head dimension.

The query heads that share a KV head, times the rows, are the queries on its keys, so no key is copied for a query head.
A sequence alone whose blocks lie side by side is read in place. Indices and masks over blocks are made once per segment
and window and shared by the layers; pages differ in every layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modicum.model.attend import attention
from modicum.model.attention import AttentionPattern
from modicum.serve.drafters import layout
from modicum.serve.kv import Entries
from modicum.serve.marks import received
from modicum.serve.plan import FRESH, PAGES, AttentionPlan, Segment, Watched, visible
from modicum.serve.recent import RecentStep
from modicum.serve.work import Work


class Reach(NamedTuple):
    """Which keys a segment reads of its blocks: an index, the range within it, where that begins in each sequence, the
    mask (1, B, T, S) or None."""

    blocks: slice | Tensor
    span: slice
    low_B: np.ndarray
    mask: Tensor | None


Key = tuple[int, int | None, AttentionPattern | None, torch.dtype]  # segment, window, pattern, dtype


class PlannedAttend:
    """An `attend` for one step: every layer calls it."""

    def __init__(self, plan: AttentionPlan):
        self.plan, self.storage, self.table = plan, plan.storage, plan.table
        self._reaches: dict[Key, Reach] = {}
        self._overlays: dict[Key, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._recent = None if plan.recent is None else RecentStep(plan.recent, plan.works, plan.table)
        device = self.storage.device
        self._rows_T = torch.from_numpy(plan.rows_T).to(device)
        self._rows_LGT = None if plan.rows_LGT is None else plan.rows_LGT.to(device)
        if self._rows_LGT is not None:
            position_T = torch.cat([torch.arange(w.start, w.start + w.n, dtype=torch.int32) for w in plan.works])
            self.storage.position_AP.view(-1)[self._rows_LGT] = position_T.to(device)
            if self.storage.weight_AP is not None:
                self.storage.weight_AP.view(-1)[self._rows_LGT] = 1.0
        self._pages = {i: _Pages(s, plan) for i, s in enumerate(plan.segments) if s.source == PAGES}
        self._at = {i: torch.from_numpy(s.at_BT).to(device) for i, s in enumerate(plan.segments)}

    def __call__(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BGSE: Tensor,
        v_BGSE: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        pattern: AttentionPattern | None = None,
    ) -> Tensor:
        q_HTE, k_GTE, v_GTE = q_BHTE[0], k_BGSE[0], v_BGSE[0]
        if self._recent is None:
            self.write(layer, k_GTE, v_GTE)
        (G, T, E), H = k_GTE.shape, q_HTE.shape[0]
        q_GRTE = q_HTE.unflatten(0, (G, H // G))
        out_TGRE = q_HTE.new_empty(T, G, H // G, E)
        for i, segment in enumerate(self.plan.segments):
            rows = slice(segment.first, segment.last)
            q_GBRTE = q_GRTE[:, :, rows].unflatten(2, (-1, segment.rows)).transpose(1, 2)
            if segment.policy is not None:
                out_GBRTE = self._by_policy(layer, i, segment, q_GBRTE, scale, softcap)
            else:
                k_GBSE, v_GBSE, mask = self._keys(layer, i, segment, window, pattern, k_GTE, v_GTE)
                how = {"window": window, "scale": scale, "softcap": softcap}
                out_GBRTE = self._mix(segment, q_GBRTE, k_GBSE, v_GBSE, mask, **how)  # type: ignore[arg-type]
            out_TGRE[rows] = out_GBRTE.permute(1, 3, 0, 2, 4).flatten(0, 1)
        if self._recent is not None:
            self._recent.write(layer, k_GTE, v_GTE)
        self._watch(layer, q_HTE, k_GTE, v_GTE, window, scale, softcap)
        return out_TGRE.view(T, H, E).transpose(0, 1)[None]

    def _unmasked(self, segment: Segment, window: int | None, pattern: AttentionPattern | None) -> bool:
        """Whether `_mix` needs no mask to see who sees whom."""
        return segment.source == FRESH and window is None and pattern is None

    def _mix(
        self,
        segment: Segment,
        q_GBRTE: Tensor,
        k_GBSE: Tensor,
        v_GBSE: Tensor,
        mask: Tensor | None,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """out_GBRTE of a segment's queries over its keys."""
        return _attention(q_GBRTE, k_GBSE, v_GBSE, mask, scale, softcap)

    def write(self, layer: int, k_GTE: Tensor, v_GTE: Tensor) -> None:
        """Keys and values of the step's rows into the cache."""
        for x, new_GTE in ((self.storage.k, k_GTE), (self.storage.v, v_GTE)):
            if self._rows_LGT is None:
                x.write(layer, self._rows_T, new_GTE)
            else:
                x.write_flat(self._rows_LGT[layer].flatten(), new_GTE.flatten(0, 1))

    def _keys(
        self,
        layer: int,
        i: int,
        segment: Segment,
        window: int | None,
        pattern: AttentionPattern | None,
        k_GTE: Tensor,
        v_GTE: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (G, B, S, E) of a segment, and its mask, (1 or G, B, T, S); None: all, or causal.

        `k_GTE` and `v_GTE` are those of the whole step."""
        dtype = k_GTE.dtype
        if segment.source == PAGES:
            k_GBSE, v_GBSE, position_GBS, seen_GBS, weight_GBS = self._pages[i].entries(layer)
            seen_GBTS = seen_GBS[:, :, None]
            if segment.rows > 1 or window is not None or pattern is not None:
                seen_GBTS = seen_GBTS & visible(self._at[i][:, :, None], position_GBS[:, :, None], window, pattern)
            if weight_GBS is None:
                return k_GBSE.to(dtype), v_GBSE.to(dtype), seen_GBTS
            bias_GBTS = torch.where(seen_GBTS, weight_GBS.log().to(dtype)[:, :, None], float("-inf"))
            return k_GBSE.to(dtype), v_GBSE.to(dtype), bias_GBTS
        key = (i, window, pattern, dtype)
        if key not in self._reaches:
            self._reaches[key] = self._reach(segment, window, pattern, dtype)
        reach = self._reaches[key]
        if segment.source == FRESH:
            rows = slice(segment.first, segment.last)
            return k_GTE[:, None, rows], v_GTE[:, None, rows], reach.mask
        B, read = len(segment.works), []
        for j, (x, new_GTE) in enumerate(((self.storage.k, k_GTE), (self.storage.v, v_GTE))):
            x_GNPE = x.blocks(layer, reach.blocks)
            x_GBSE = x_GNPE.unflatten(1, (B, -1)).flatten(2, 3)[:, :, reach.span].to(dtype)
            if self._recent is not None:
                x_GBSE = x_GBSE.contiguous()
                if key not in self._overlays:
                    where = self._recent.overlay(segment.works, reach.low_B, x_GBSE.shape[2])
                    self._overlays[key] = where
                self._recent.read(layer, j, x_GBSE, new_GTE, self._overlays[key])
            read.append(x_GBSE)
        return read[0], read[1], reach.mask

    def _reach(
        self, segment: Segment, window: int | None, pattern: AttentionPattern | None, dtype: torch.dtype
    ) -> Reach:
        P, device, T, B = self.storage.block_size, self.storage.device, segment.rows, len(segment.works)
        starts_B = segment.starts_B
        ends_B = starts_B + T
        if window is not None and window >= ends_B.max():
            window = None
        unmasked = self._unmasked(segment, window, pattern)
        if segment.source == FRESH and unmasked:
            return Reach(slice(0), slice(None), starts_B, None)
        low_B = np.zeros_like(starts_B) if window is None else np.maximum(0, starts_B + 1 - window)
        first_B, last_B = low_B // P, -(-ends_B // P)
        blocks: slice | Tensor
        if B == 1:
            low, end, first = int(low_B[0]), int(ends_B[0]), int(first_B[0])
            numbers = self.table.numbers[segment.works[0].sample.slot, first : int(last_B[0])]
            side_by_side = bool((np.diff(numbers) == 1).all())
            blocks = slice(int(numbers[0]), int(numbers[-1]) + 1) if side_by_side else _index(numbers, device)
            span = slice(low - first * P, end - first * P)
            if unmasked or (T == 1 and pattern is None):
                return Reach(blocks, span, low_B, None)
            offset_BS = torch.arange(low, end)[None]
        else:
            slots_B1 = np.array([w.sample.slot for w in segment.works])[:, None]
            width = int((last_B - first_B).max())
            columns_BN = np.minimum(first_B[:, None] + np.arange(width), self.table.numbers.shape[1] - 1)
            blocks, span = _index(self.table.numbers[slots_B1, columns_BN].ravel(), device), slice(None)
            low_B = first_B * P
            offset_BS = torch.from_numpy(low_B[:, None] + np.arange(width * P))
        where = torch.device("cpu") if T == 1 else device  # small ones are looked at before they are sent
        seen_BTS = _seen(segment, offset_BS.to(where), window, pattern)
        if T == 1 and bool(seen_BTS.all()):
            return Reach(blocks, span, low_B, None)
        if T > 1 and not segment.tree:
            return Reach(blocks, span, low_B, seen_BTS[None])
        mask_BTS = torch.zeros(seen_BTS.shape, dtype=dtype, device=where).masked_fill_(~seen_BTS, float("-inf"))
        return Reach(blocks, span, low_B, mask_BTS[None].to(device))

    def _by_policy(
        self, layer: int, i: int, segment: Segment, q_GBRTE: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        if segment.source == PAGES:
            k_GBSE, v_GBSE, position_GBS, kept_GBS, _ = self._pages[i].entries(layer)
        else:
            kept = self._kept(layer, segment.works[0])
            k_GBSE, v_GBSE, position_GBS = kept.k_GSE[:, None], kept.v_GSE[:, None], kept.position_GS[:, None]
            kept_GBS = torch.ones_like(position_GBS, dtype=torch.bool)
        assert segment.policy is not None
        k_GBSE, v_GBSE = k_GBSE.to(q_GBRTE.dtype), v_GBSE.to(q_GBRTE.dtype)
        given = (q_GBRTE, k_GBSE, v_GBSE, self._at[i], position_GBS, kept_GBS)
        return segment.policy.attend(layer, *given, scale=scale, softcap=softcap)

    def _kept(self, layer: int, w: Work) -> Entries:
        """What a sequence holds in a layer, this step's tokens included."""
        if w.sample.pages is None:
            return self.storage.entries_of_blocks(layer, w.sample.blocks, w.start + w.n)
        return self.storage.entries_of_pages(layer, w.sample.pages, w.n)

    def _watch(
        self,
        layer: int,
        q_HTE: Tensor,
        k_GTE: Tensor,
        v_GTE: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Show policies what they look at."""

        def tokens(one: Watched) -> list[Tensor]:
            return [x_XTE[:, one.rows] for x_XTE in (q_HTE, k_GTE, v_GTE)]

        def mass(one: Watched) -> Tensor:
            q_GRTE = q_HTE[:, one.rows].unflatten(0, (k_GTE.shape[0], -1))
            kept, largest = self._kept(layer, one.work), one.work.sample.policy.marks == "max"
            how = {"window": window, "scale": scale, "softcap": softcap, "largest": largest}
            return received(q_GRTE, kept, one.positions.start, **how)

        self.plan.show(layer, tokens, mass)


class _Pages:
    """The pages of a segment's sequences, one table for all of them."""

    def __init__(self, segment: Segment, plan: AttentionPlan):
        self.storage = s = plan.storage
        pages = [w.sample.pages for w in segment.works if w.sample.pages is not None]
        width = max(p.table_LGN.shape[2] for p in pages)
        table_LGBN = torch.zeros((s.layers, s.heads, len(pages), width), dtype=torch.int64)
        for b, p in enumerate(pages):
            table_LGBN[:, :, b, : p.table_LGN.shape[2]] = p.table_LGN
        self.table_LGBN = table_LGBN.to(s.device)
        self.count_LGB = torch.stack([p.count_LG + segment.rows for p in pages], dim=2).to(s.device)

    def entries(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """k, v (G, B, S, E), positions, whether held, and how many tokens each stands for, (G, B, S)."""
        s, table_GBN = self.storage, self.table_LGBN[layer]
        k_GBSE, v_GBSE = (x.pages(table_GBN).flatten(2, 3) for x in (s.k, s.v))
        position_GBS = s.position_AP[table_GBN].flatten(2)
        kept_GBS = torch.arange(k_GBSE.shape[2], device=s.device) < self.count_LGB[layer][:, :, None]
        weight_GBS = None if s.weight_AP is None else s.weight_AP[table_GBN].flatten(2)
        return k_GBSE, v_GBSE, position_GBS, kept_GBS, weight_GBS


def _seen(segment: Segment, offset_BS: Tensor, window: int | None, pattern: AttentionPattern | None) -> Tensor:
    """Which entries each row sees, (B, T, S). `offset_BS`: their places in their sequences' caches."""
    at_BT1 = torch.from_numpy(segment.at_BT).to(offset_BS.device)[:, :, None]
    if not segment.tree:
        return visible(at_BT1, offset_BS[:, None], window, pattern)
    # Drafted tokens lie behind the cached ones in the tree's order, at the positions of their depths.
    layouts = [layout(w.tree) for w in segment.works if w.tree is not None]
    node_BS = offset_BS - torch.from_numpy(segment.starts_B).to(offset_BS.device)[:, None]
    drafted_BS = (node_BS >= 0) & (node_BS < segment.rows)
    node_BS = node_BS.clamp(0, segment.rows - 1)
    position_BS = torch.where(drafted_BS, at_BT1[:, :, 0].gather(1, node_BS), offset_BS)
    sees_BXX = torch.from_numpy(np.stack([one.sees_XX for one in layouts])).to(offset_BS.device)
    related_BTS = sees_BXX.gather(2, node_BS[:, None].expand(-1, segment.rows, -1))
    return visible(at_BT1, position_BS[:, None], window, pattern) & (related_BTS | ~drafted_BS[:, None])


def _attention(
    q_GBRTE: Tensor, k_GBSE: Tensor, v_GBSE: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """out_GBRTE, by the call that copies no key."""
    B, R, T = q_GBRTE.shape[1:4]
    if T == 1:  # the query heads of a KV head as queries, sequences as heads
        out_GBRE = attention(q_GBRTE[:, :, :, 0], k_GBSE, v_GBSE, scale=scale, softcap=softcap, mask=mask)
        return out_GBRE[:, :, :, None]
    if B == 1:  # the query heads of a KV head as heads, its keys the same for all of them
        k_GRSE, v_GRSE = k_GBSE.expand(-1, R, -1, -1), v_GBSE.expand(-1, R, -1, -1)
        how = {"scale": scale, "softcap": softcap, "mask": mask, "causal": mask is None}
        return attention(q_GBRTE[:, 0], k_GRSE, v_GRSE, **how)[:, None]  # type: ignore[arg-type]
    if mask is not None:
        mask = mask[:, :, None].expand(-1, -1, R, -1, -1).flatten(2, 3)
    out = attention(q_GBRTE.flatten(2, 3), k_GBSE, v_GBSE, scale=scale, softcap=softcap, mask=mask)
    return out.unflatten(2, (R, T))


def _index(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers.copy()).to(device)
