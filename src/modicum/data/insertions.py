"""Texts in the stead of some of a stream's tokens: nothing else of a batch changes, neither its size nor its order.

Each text stands in one row, as a document of its own, `repeats` times over the run and evenly. What was planned at
its positions is not read in this run. Inserting would shift all that follows; replacing leaves every other position
as it is, so that runs with different texts can be compared position by position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modicum.core.errors import UserError
from modicum.data.batch import Batch
from modicum.data.tokenizer import Tokenizer

FIRST = 1_000_000  # number of the first of these documents in a row: above any of the stream's own
MOST = 0.5  # of a run's tokens that may be replaced


@dataclass(frozen=True)
class Inserted:
    """One occurrence: `ids` are a document as it is stored (start, text, end), its predictions begin at `offset`."""

    row: int
    offset: int
    ids: np.ndarray


def positions(
    texts: Sequence[tuple[str, str, int]], tokenizer: Tokenizer, rows: int, length: int, seed: int
) -> list[Inserted]:
    """Where each of `texts` (name, text, repeats) stands in a run of `rows` rows of `length` tokens.

    An occurrence is spread evenly by its own count and a phase of its own name, so that it stays where it is when other
    texts join, unless its row is full. Raises `UserError` for a text that is longer than a row, or too many of them.
    """
    used = np.zeros(rows, np.int64)
    placed: list[Inserted] = []
    encoded = tokenizer.encode_batch([text for _, text, _ in texts], specials=False)
    whole = sum((len(ids) + 1) * repeats for ids, (_, _, repeats) in zip(encoded, texts, strict=True))
    if whole > MOST * rows * length:
        raise UserError(
            f"the texts of the experiments are {whole / (rows * length):.0%} of the run's {rows * length} tokens; give "
            "fewer texts or repeats, or a longer run"
        )
    for ids, (name, _, repeats) in zip(encoded, texts, strict=True):
        stored = np.array([tokenizer.start_id, *ids, tokenizer.eos_id], np.int64)
        size = len(stored) - 1
        if size > length:
            raise UserError(f"a text of {name} has {size} tokens and a row {length}; ask for longer rows")
        phase = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") / 2**64
        for k in range(repeats):
            row = int((k + phase) / repeats * rows)
            while used[row] + size > length:
                row = (row + 1) % rows
            placed.append(Inserted(row, int(used[row]), stored))
            used[row] += size
    return placed


class Inserting:
    """A stream of rows of one length with texts in it; everything else it does as `stream` does."""

    def __init__(self, stream: Any, inserted: Sequence[Inserted]):
        self.stream = stream
        self._by_row: dict[int, list[Inserted]] = {}
        for one in inserted:
            self._by_row.setdefault(one.row, []).append(one)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def next_batch(self, n: int) -> Batch:
        first: int = self.stream.rows_given
        batch: Batch = self.stream.next_batch(n)
        chosen = [(row - first, one) for row in range(first, first + len(batch)) for one in self._by_row.get(row, ())]
        if not chosen:
            return batch
        if batch.tokens_BT.shape[1] != self.stream.sequence_length:
            raise UserError("texts cannot be put into rows of several lengths; choose packing concat")
        batch = batch.map(torch.Tensor.clone)
        for k, (b, one) in enumerate(chosen):
            at = slice(one.offset, one.offset + len(one.ids) - 1)
            batch.tokens_BT[b, at] = torch.from_numpy(one.ids[:-1])
            batch.targets_BT[b, at] = torch.from_numpy(one.ids[1:])
            if batch.documents_BT is not None:
                batch.documents_BT[b, at] = FIRST + k  # attention stays within the text
                batch.positions_BT[b, at] = torch.arange(len(one.ids) - 1)
        return batch
