"""Attention of one engine step: many sequences in one row of tokens, keys and values in blocks.

Shapes: T tokens of the step, B sequences, L layers, H query heads, G KV heads, R = H / G, S keys,
N blocks or pages of a sequence, P block_size, E head dimension.

The step's tokens lie in one row: first the sequences that compute a single token, shortest first, then
pieces of prompts. The single tokens of a group of sequences of similar length are one call with KV
heads as the batch, sequences as the heads and the query heads of a KV head as queries, (G, B, R, E): so
no key is copied per query head. A sequence alone whose blocks lie side by side is read in place.
Indices and masks are made once per step and window and shared by the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modicum.model.attend import attention
from modicum.serve.kv import Entries
from modicum.serve.marks import received
from modicum.serve.pages import Storage
from modicum.serve.request import Sample
from modicum.serve.thinned import Thinned, entries_of_piece, piece_of_pages
from modicum.serve.trees import TreeAttend
from modicum.serve.work import Work, by_policy


@dataclass(slots=True)
class _Group:
    """Sequences with one token each, at row places first .. last - 1."""

    first: int
    last: int
    samples: list[Sample]
    slots_B: np.ndarray
    lengths_B: np.ndarray  # keys, the new token's included


# Which keys a group or a piece reads: blocks as an index (made from a view if they lie side by side), the
# range of entries within them, and the mask (None: all of them, or causal).
_Reach = tuple["slice | Tensor", slice, "Tensor | None"]


def _own_policy(w: Work) -> int | None:
    """Which policy a sequence attends by; None for plain attention."""
    return id(w.sample.policy) if by_policy(w) else None


class StepAttend:
    """An `attend` for the decoder. `begin` prepares a step, then every layer calls the object."""

    def __init__(self, storage: Storage, max_sequences: int):
        self.storage = storage
        self.table = np.zeros((max_sequences, 1), dtype=np.int64)  # block numbers by slot, see `hold`
        self.faults: dict[int, Exception] = {}  # by sequence, of policies that failed while they observed

    def hold(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """Note the blocks of a slot from place `first` on; the table grows with its longest sequence."""
        end = first + len(blocks)
        if end > self.table.shape[1]:
            wider = np.zeros((len(self.table), max(end, 2 * self.table.shape[1])), dtype=np.int64)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        self.table[slot, first:end] = blocks

    def flat(self, slots: Sequence[int], places: Sequence[int]) -> Tensor:
        """Where these entries of sequences lie in a layer's storage, its blocks taken as one row."""
        P, at = self.storage.block_size, np.array(places, dtype=np.int64)
        return torch.from_numpy(self.table[np.array(slots), at // P] * P + at % P).to(self.storage.device)

    def begin(self, works: Sequence[Work], observe: bool = False) -> None:
        """`works` in row order: see `work.arrange`."""
        P = self.storage.block_size
        self.faults.clear()
        self._observers = [w for w in works if w.sample.policy.wants(w.start, w.n)] if observe else []
        self._marked = [w for w in works if w.sample.policy.marks] if observe else []
        trees = [w for w in works if w.tree is not None]
        singles = [w for w in works if w.n == 1 and w.tree is None]
        # Single tokens that attend in their policy's way from whole blocks: rare, and computed as pieces.
        own = [w for w in singles if w.sample.pages is None and by_policy(w)]
        self._pieces = own + [w for w in works if w.n > 1 and w.tree is None]
        self._trees = TreeAttend(self, trees) if trees else None
        self._groups = self._grouped([w for w in singles if w.sample.pages is None and not by_policy(w)])
        thinned = [w for w in singles if w.sample.pages is not None]
        self._thinned = [Thinned(list(same), self.storage) for _, same in itertools.groupby(thinned, _own_policy)]
        self._reaches: dict[tuple[int, int | None, torch.dtype], _Reach] = {}
        rows = np.empty(sum(w.n for w in works), dtype=np.int64)
        for g in self._groups:
            at = g.lengths_B - 1
            rows[g.first : g.last] = self.table[g.slots_B, at // P] * P + at % P
        for w in (*trees, *self._pieces):
            if w.sample.pages is None:
                at = np.arange(w.start, w.start + w.n)
                rows[w.at : w.at + w.n] = self.table[w.sample.slot, at // P] * P + at % P
        self.rows_T = torch.from_numpy(rows).to(self.storage.device)
        self._rows_LGT = self._scattered(works, rows) if any(w.sample.pages is not None for w in works) else None

    def _grouped(self, works: Sequence[Work]) -> list[_Group]:
        """Neighbours whose numbers of blocks are within a factor of two, or eight blocks."""
        groups: list[list[Work]] = []
        limit = -1
        for w in works:
            blocks = w.start // self.storage.block_size + 1
            if blocks > limit:
                groups.append([])
                limit = max(2 * blocks, blocks + 8)
            groups[-1].append(w)
        return [
            _Group(
                g[0].at,
                g[-1].at + 1,
                [w.sample for w in g],
                np.array([w.sample.slot for w in g]),
                np.array([w.start + 1 for w in g]),
            )
            for g in groups
        ]

    def _scattered(self, works: Sequence[Work], rows: np.ndarray) -> Tensor:
        """Rows of the flat storage per layer and head, for a step in which some sequences are thinned."""
        s = self.storage
        part_LG1 = torch.arange(s.pages_per_block).view(s.layers, s.heads, 1)
        rows_LGT = part_LG1 * (s.n_blocks * s.block_size) + torch.from_numpy(rows)
        position_T = torch.zeros(len(rows), dtype=torch.int32)
        for w in works:
            position_T[w.at : w.at + w.n] = torch.arange(w.start, w.start + w.n)
            if w.sample.pages is not None:
                rows_LGT[:, :, w.at : w.at + w.n] = s.rows_of_pages(w.sample.pages, w.n)
        rows_LGT = rows_LGT.to(s.device)
        s.position_AP.view(-1)[rows_LGT] = position_T.to(s.device)
        if s.weight_AP is not None:
            s.weight_AP.view(-1)[rows_LGT] = 1.0
        return rows_LGT

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
    ) -> Tensor:
        q_HTE, k_GTE, v_GTE = q_BHTE[0], k_BGSE[0], v_BGSE[0]
        self._write(layer, k_GTE, v_GTE)
        G = k_GTE.shape[0]
        H, T, E = q_HTE.shape
        q_GRTE = q_HTE.unflatten(0, (G, H // G))
        out_TGRE = q_HTE.new_empty(T, G, H // G, E)
        for i, group in enumerate(self._groups):
            out_TGRE[group.first : group.last] = self._single(
                layer, i, group, q_GRTE[:, :, group.first : group.last], window, scale, softcap
            )
        for thinned in self._thinned:
            first, last = thinned.first, thinned.last
            out_TGRE[first:last] = thinned(layer, q_GRTE[:, :, first:last], window, scale, softcap)
        if self._trees:
            first, last = self._trees.first, self._trees.last
            out_TGRE[first:last] = self._trees(layer, q_GRTE[:, :, first:last], window, scale, softcap)
        for i, w in enumerate(self._pieces):
            places = slice(w.at, w.at + w.n)
            out_TGRE[places] = self._piece(
                layer, i, w, q_GRTE[:, :, places], k_GTE[:, places], v_GTE[:, places], window, scale, softcap
            )
        for w in self._observers:
            places = slice(w.at, w.at + w.n)
            if w.sample.id not in self.faults:
                try:
                    w.sample.policy.observe(layer, w.start, q_HTE[:, places], k_GTE[:, places], v_GTE[:, places])
                except Exception as error:
                    self.faults[w.sample.id] = error
        for w in self._marked:
            q_GRXE = q_GRTE[:, :, w.at : w.at + w.n]
            mass_GS = received(q_GRXE, self._held(layer, w), w.start, window=window, scale=scale, softcap=softcap)
            w.sample.policy.mark(layer, mass_GS)
        return out_TGRE.view(T, H, E).transpose(0, 1)[None]

    def _write(self, layer: int, k_GTE: Tensor, v_GTE: Tensor) -> None:
        s = self.storage
        k_GTE, v_GTE = k_GTE.to(s.k_LGNPE.dtype), v_GTE.to(s.v_LGNPE.dtype)
        if self._rows_LGT is None:
            s.k_LGNPE[layer].flatten(1, 2).index_copy_(1, self.rows_T, k_GTE)
            s.v_LGNPE[layer].flatten(1, 2).index_copy_(1, self.rows_T, v_GTE)
        else:
            rows, E = self._rows_LGT[layer].flatten(), k_GTE.shape[-1]
            s.k_LGNPE.view(-1, E).index_copy_(0, rows, k_GTE.reshape(-1, E))
            s.v_LGNPE.view(-1, E).index_copy_(0, rows, v_GTE.reshape(-1, E))

    def _single(
        self,
        layer: int,
        i: int,
        group: _Group,
        q_GRBE: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """One token of each sequence of a group; returns out_BGRE."""
        key = (i, window, q_GRBE.dtype)
        if key not in self._reaches:
            self._reaches[key] = self._group_reach(group, window, q_GRBE.dtype)
        blocks, span, mask = self._reaches[key]
        k_GBSE, v_GBSE = (
            self._read(x[layer], blocks, len(group.samples))[:, :, span].to(q_GRBE.dtype)
            for x in (self.storage.k_LGNPE, self.storage.v_LGNPE)
        )
        out_GBRE = attention(q_GRBE.transpose(1, 2), k_GBSE, v_GBSE, scale=scale, softcap=softcap, mask=mask)
        return out_GBRE.transpose(0, 1)

    def _piece(
        self,
        layer: int,
        i: int,
        w: Work,
        q_GRTE: Tensor,
        k_GTE: Tensor,
        v_GTE: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Several tokens of one sequence; returns out_TGRE."""
        key = (-1 - i, window, q_GRTE.dtype)
        mask: Tensor | None
        if by_policy(w):
            return self._by_policy(layer, w, q_GRTE, scale, softcap)
        if w.sample.pages is not None:
            k_GSE, v_GSE, mask = piece_of_pages(self.storage, layer, w, window, q_GRTE.dtype)
        else:
            if key not in self._reaches:
                self._reaches[key] = self._piece_reach(w, window)
            blocks, span, mask = self._reaches[key]
            if w.start == 0:
                k_GSE, v_GSE = k_GTE, v_GTE
            else:
                k_GSE, v_GSE = (
                    self._read(x[layer], blocks, 1)[:, 0, span] for x in (self.storage.k_LGNPE, self.storage.v_LGNPE)
                )
        k_GSE, v_GSE, R = k_GSE.to(q_GRTE.dtype), v_GSE.to(q_GRTE.dtype), q_GRTE.shape[1]
        out_GRTE = attention(
            q_GRTE,
            k_GSE[:, None].expand(-1, R, -1, -1),
            v_GSE[:, None].expand(-1, R, -1, -1),
            scale=scale,
            softcap=softcap,
            mask=mask,
            causal=mask is None,
        )
        return out_GRTE.permute(2, 0, 1, 3)

    def _held(self, layer: int, w: Work) -> Entries:
        """What a sequence holds in a layer, this step's tokens included."""
        if w.sample.pages is None:
            return self.storage.entries_of_blocks(layer, w.sample.blocks, w.start + w.n)
        return self.storage.entries_of_pages(layer, w.sample.pages, w.n)

    def _by_policy(self, layer: int, w: Work, q_GRTE: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Several tokens of one sequence whose policy attends itself; returns out_TGRE."""
        s, pages, end = self.storage, w.sample.pages, w.start + w.n
        if pages is None:
            e = s.entries_of_blocks(layer, w.sample.blocks, end)
            k_GSE, v_GSE, position_GS = e.k_GSE, e.v_GSE, e.position_GS
            held_GS = torch.ones_like(position_GS, dtype=torch.bool)
        else:
            k_GSE, v_GSE, position_GS, held_GS = entries_of_piece(s, layer, w)
        out_GBRTE = w.sample.policy.attend(
            layer,
            q_GRTE[:, None],
            k_GSE[:, None].to(q_GRTE.dtype),
            v_GSE[:, None].to(q_GRTE.dtype),
            torch.arange(w.start, end, device=s.device)[None],
            position_GS[:, None],
            held_GS[:, None],
            scale=scale,
            softcap=softcap,
        )
        return out_GBRTE[:, 0].permute(2, 0, 1, 3)

    def _read(self, x_GNPE: Tensor, blocks: slice | Tensor, B: int) -> Tensor:
        """Keys or values of blocks, as (G, B, S, E); a view for a slice."""
        G = x_GNPE.shape[0]
        if isinstance(blocks, slice):
            return x_GNPE[:, blocks].flatten(1, 2)[:, None]
        return x_GNPE.index_select(1, blocks).view(G, B, -1, x_GNPE.shape[-1])

    def _blocks(self, slot: int, first: int, last: int) -> slice | Tensor:
        blocks = self.table[slot, first:last]
        if (np.diff(blocks) == 1).all():
            return slice(int(blocks[0]), int(blocks[-1]) + 1)
        return torch.from_numpy(blocks.copy()).to(self.storage.device)

    def _group_reach(self, group: _Group, window: int | None, dtype: torch.dtype) -> _Reach:
        P, device = self.storage.block_size, self.storage.device
        low_B = np.zeros_like(group.lengths_B) if window is None else np.maximum(0, group.lengths_B - window)
        first_B, last_B = low_B // P, -(-group.lengths_B // P)
        if len(low_B) == 1:
            start = int(first_B[0]) * P
            return (
                self._blocks(int(group.slots_B[0]), int(first_B[0]), int(last_B[0])),
                slice(int(low_B[0]) - start, int(group.lengths_B[0]) - start),
                None,
            )
        width = int((last_B - first_B).max())
        columns_BN = np.minimum(first_B[:, None] + np.arange(width), self.table.shape[1] - 1)
        blocks = torch.from_numpy(self.table[group.slots_B[:, None], columns_BN].ravel()).to(device)
        position_BS = first_B[:, None] * P + np.arange(width * P)
        hidden_BS = (position_BS < low_B[:, None]) | (position_BS >= group.lengths_B[:, None])
        if not hidden_BS.any():
            return blocks, slice(None), None
        mask = torch.zeros((1, len(low_B), 1, width * P), dtype=dtype, device=device)
        mask.masked_fill_(torch.from_numpy(hidden_BS).to(device)[None, :, None], float("-inf"))
        return blocks, slice(None), mask

    def _piece_reach(self, w: Work, window: int | None) -> _Reach:
        P, device = self.storage.block_size, self.storage.device
        end = w.start + w.n
        window = None if window is None or window >= end else window
        if w.start == 0 and window is None:
            return slice(0), slice(None), None
        low = 0 if window is None or w.start == 0 else max(0, w.start + 1 - window)
        first = low // P
        query_T1 = torch.arange(w.start, end, device=device)[:, None]
        key_S = torch.arange(low, end, device=device)
        mask = key_S <= query_T1
        if window is not None:
            mask &= key_S > query_T1 - window
        blocks = slice(0) if w.start == 0 else self._blocks(w.sample.slot, first, -(-end // P))
        return blocks, slice(low - first * P, end - first * P), mask[None, None]
