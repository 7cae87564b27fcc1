"""Which blocks each running sequence has: rows of numbers by slot, as kernels and indices read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BlockTable:
    """`numbers` is (slots, N), int64; what lies past a sequence's blocks means nothing."""

    def __init__(self, slots: int, block_size: int):
        self.numbers, self.block_size = np.zeros((slots, 1), dtype=np.int64), block_size

    def hold(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """Note the blocks of a slot from its `first` on; the table grows with its longest sequence."""
        end = first + len(blocks)
        if end > self.numbers.shape[1]:
            wider = np.zeros((len(self.numbers), max(end, 2 * self.numbers.shape[1])), dtype=np.int64)
            wider[:, : self.numbers.shape[1]] = self.numbers
            self.numbers = wider
        self.numbers[slot, first:end] = blocks

    def rows(self, slots: Sequence[int] | np.ndarray | int, offsets: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where these entries of sequences lie in a layer's storage, its blocks taken as one row."""
        at = np.asarray(offsets, dtype=np.int64)
        return self.numbers[np.asarray(slots), at // self.block_size] * self.block_size + at % self.block_size
