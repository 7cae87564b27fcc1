"""What training reads: spans of documents, their tokens, and batches of rows.

Shapes: B rows, T tokens of a row, N tokens of a span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modicum.core.errors import UserError

NO_LOSS = -100  # a target that is not learnt


class EndOfData(UserError):
    """A stream with a number of epochs has given everything it has."""


class Span(NamedTuple):
    """Consecutive predictions of one document: stored tokens start ... start+length-1 and those one later."""

    domain: str
    document: int
    start: int
    length: int

    def split(self, length: int) -> tuple[Span, Span]:
        """The first `length` predictions and the rest."""
        rest = self._replace(start=self.start + length, length=self.length - length)
        return self._replace(length=length), rest


class Tokens(NamedTuple):
    """The tokens of a span in a row.

    tokens_N, targets_N: int64, what is read and what each predicts (NO_LOSS: nothing). extras: float32 [N] by name, one
    number a token (a weight, a score), 0 where others of the batch have it and this does not.
    """

    tokens_N: np.ndarray
    targets_N: np.ndarray
    extras: Mapping[str, np.ndarray] = {}


@dataclass(frozen=True)
class Batch:
    """tokens_BT int64; targets_BT int64, NO_LOSS where nothing is learnt; positions_BT int64.

    documents_BT int64: attention stays among equal numbers, -1 is padding. None where attention may
    cross documents (plain causal attention is then right and faster; padding stands last in its row).
    extras: float32 [B, T] by name, one number a token. Batches of one run may differ in B and T, not in B x T.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None
    positions_BT: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    @property
    def n_targets(self) -> int:
        return int((self.targets_BT != NO_LOSS).sum())

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed."""
        return Batch(
            change(self.tokens_BT),
            change(self.targets_BT),
            None if self.documents_BT is None else change(self.documents_BT),
            change(self.positions_BT),
            {name: change(x) for name, x in self.extras.items()},
        )

    def rows(self, rank: int, world: int) -> Batch:
        """Rows rank, rank + world, ...: those of one process."""
        return self.map(lambda x: x[rank::world])

    def slice(self, start: int, stop: int) -> Batch:
        """Rows start ... stop-1: one micro-batch."""
        return self.map(lambda x: x[start:stop])

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches of one row length, all masked or none; extras are those of the first."""
    first = batches[0]
    documents = [b.documents_BT for b in batches if b.documents_BT is not None]
    return Batch(
        torch.cat([b.tokens_BT for b in batches]),
        torch.cat([b.targets_BT for b in batches]),
        torch.cat(documents) if documents else None,
        torch.cat([b.positions_BT for b in batches]),
        {name: torch.cat([b.extras[name] for b in batches]) for name in first.extras},
    )


def assemble(rows: Sequence[Sequence[Tokens]], length: int, *, masked: bool, padding: int = 0) -> Batch:
    """A batch of rows of `length` tokens, each row the tokens of its spans one after another, padded at its end.

    masked: attention stays within a span, and positions begin at 0 in each. padding: the token id that fills rows.
    """
    shape = (len(rows), length)
    tokens, targets = np.full(shape, padding, np.int64), np.full(shape, NO_LOSS, np.int64)
    documents, positions = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    names = {name for row in rows for part in row for name in part.extras}
    extras = {name: np.zeros(shape, np.float32) for name in sorted(names)}
    ramp = np.arange(length)
    for b, row in enumerate(rows):
        at = 0
        for k, part in enumerate(row):
            end = at + len(part.tokens_N)
            tokens[b, at:end], targets[b, at:end] = part.tokens_N, part.targets_N
            documents[b, at:end], positions[b, at:end] = k, ramp[: end - at]
            for name, values in part.extras.items():
                extras[name][b, at:end] = values
            at = end
    if not masked:
        positions[:] = ramp
    made = [torch.from_numpy(x) for x in (tokens, targets, documents, positions)]
    return Batch(
        made[0], made[1], made[2] if masked else None, made[3], {n: torch.from_numpy(x) for n, x in extras.items()}
    )
