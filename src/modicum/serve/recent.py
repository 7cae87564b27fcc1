"""The latest tokens of each sequence as they are, where a cache form codes whole blocks only (`CacheForm.residual`).

A ring for each slot: token i of a sequence lies at i mod W, with W = residual + P, which holds what is not coded yet
after a step. In a step everything that is not coded is laid over what the blocks decode to; afterwards the blocks that
have left the residual are coded, and the step's last tokens take their places in the ring.

Shapes: L layers, G KV heads, S keys that a segment reads, B sequences, T rows of each, P block_size, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modicum.serve.coded import lazy_zeros
from modicum.serve.pages import Storage
from modicum.serve.table import BlockTable
from modicum.serve.work import Work


def coded_after(coded: int, length: int, residual: int, block_size: int) -> int:
    """Tokens of a sequence that are in codes once `length` have been computed, `coded` of which were before."""
    return max(coded, (length - residual) // block_size * block_size)


class Recent:
    def __init__(self, storage: Storage, slots: int, head_dim: int):
        self.storage, self.width = storage, storage.form.residual + storage.block_size
        shape = (storage.layers, storage.heads, slots * self.width, head_dim)
        self.kv = [lazy_zeros(shape, storage.form.dtype, storage.device) for _ in "kv"]

    @property
    def bytes_per_sequence(self) -> int:
        return sum(x.shape[0] * x.shape[1] * self.width * x.shape[3] * x.itemsize for x in self.kv)

    def rows(self, w: Work, offsets: np.ndarray) -> np.ndarray:
        return w.sample.slot * self.width + offsets % self.width


class RecentStep:
    """A step's indices into the rings: what is laid over decoded blocks, what is coded, what is kept."""

    def __init__(self, recent: Recent, works: Sequence[Work], table: BlockTable):
        self.recent = recent
        P, residual = recent.storage.block_size, recent.storage.form.residual
        coded, fresh, kept_from, kept_to, blocks, begins = [], [], [], [], [], []
        for w in works:
            end = w.start + w.n
            first, last = w.sample.coded, coded_after(w.sample.coded, end, residual, P)
            # Rows of the ring and of the step side by side: ring first, so the step's rows come after its length.
            offsets = np.arange(first, last)
            old = offsets < w.start
            coded.append(np.where(old, recent.rows(w, offsets), -1))
            fresh.append(np.where(old, 0, w.at + offsets - w.start))
            blocks.append(table.numbers[w.sample.slot, first // P : last // P])
            begins.append(np.arange(first, last, P))
            stays = np.arange(max(last, w.start), end)
            kept_from.append(w.at + stays - w.start)
            kept_to.append(recent.rows(w, stays))
        device = recent.storage.device
        self._coded, self._fresh, self._from, self._to, self._blocks, self._begins = (
            torch.from_numpy(np.concatenate(x).astype(np.int64)).to(device)
            for x in (coded, fresh, kept_from, kept_to, blocks, begins)
        )

    def overlay(self, works: Sequence[Work], low_B: np.ndarray, S: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a segment whose sequences' keys begin at `low_B`: (from the ring, to keys, from the step, to keys)."""
        parts: list[list[np.ndarray]] = [[], [], [], []]
        for b, (w, low) in enumerate(zip(works, low_B.tolist(), strict=True)):
            ring = np.arange(max(w.sample.coded, low), w.start)
            step = np.arange(max(w.start, low), w.start + w.n)
            parts[0].append(self.recent.rows(w, ring))
            parts[1].append(b * S + ring - low)
            parts[2].append(w.at + step - w.start)
            parts[3].append(b * S + step - low)
        device = self.recent.storage.device
        ring_from, ring_to, step_from, step_to = (torch.from_numpy(np.concatenate(x)).to(device) for x in parts)
        return ring_from, ring_to, step_from, step_to

    def read(
        self, layer: int, i: int, x_GBSE: Tensor, x_GTE: Tensor, where: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        """Put what is not coded over the decoded keys (i = 0) or values (1), in place."""
        ring_from, ring_to, step_from, step_to = where
        x_GXE = x_GBSE.flatten(1, 2)
        x_GXE.index_copy_(1, ring_to, self.recent.kv[i][layer].index_select(1, ring_from).to(x_GXE.dtype))
        x_GXE.index_copy_(1, step_to, x_GTE.index_select(1, step_from).to(x_GXE.dtype))

    def write(self, layer: int, k_GTE: Tensor, v_GTE: Tensor) -> None:
        """Code what has left the residual, keep the rest; after the layer's attention."""
        storage = self.recent.storage
        for ring, coded, new_GTE in zip(self.recent.kv, (storage.k, storage.v), (k_GTE, v_GTE), strict=True):
            new_GTE = new_GTE.to(ring.dtype)
            if len(self._blocks):
                old_GNE = ring[layer].index_select(1, self._coded.clamp(min=0))
                x_GNE = torch.where(self._coded[:, None] >= 0, old_GNE, new_GTE.index_select(1, self._fresh))
                coded.write_blocks(layer, self._blocks, self._begins, x_GNE.unflatten(1, (-1, storage.block_size)))
            ring[layer].index_copy_(1, self._to, new_GTE.index_select(1, self._from))
