"""The order in which pairs are trained on, by the stream protocol of the training loop.

Whole pairs, never parts of one, are packed into rows; attention stays within a pair. Each epoch goes
through a permutation of all pairs that its number and the seed fix, and its last row may be short.
The state is the epoch and the rows given out of it.

Shapes: B sequences, T = sequence_length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modicum.adapt.examples import Encoded, rows
from modicum.core.errors import UserError
from modicum.data.batch import NO_LOSS, Batch, EndOfData, Tokens, assemble


class PairStream:
    """Batches of packed pairs. epochs: None to go on for ever."""

    def __init__(
        self,
        examples: list[Encoded],
        *,
        sequence_length: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ):
        if not examples:
            raise UserError("there are no pairs to train on")
        self.examples, self.sequence_length = examples, sequence_length
        self.lengths = [len(e) for e in examples]
        if max(self.lengths) > sequence_length:
            raise UserError(f"a pair of {max(self.lengths)} tokens does not fit sequence_length={sequence_length}")
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.epoch = self.given = 0
        self._rows: tuple[int, list[list[int]]] | None = None

    def rows_of(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, each the numbers of its pairs."""
        if self._rows is None or self._rows[0] != epoch:
            order = np.arange(len(self.examples))
            if self.shuffle:
                order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(order))
            self._rows = epoch, list(rows(self.lengths, order.tolist(), self.sequence_length))
        return self._rows[1]

    def next_batch(self, n: int) -> Batch:
        """The next `n` rows of the global order; fewer at the end, then EndOfData."""
        picked: list[list[int]] = []
        while len(picked) < n and (self.epochs is None or self.epoch < self.epochs):
            present = self.rows_of(self.epoch)
            take = present[self.given : self.given + n - len(picked)]
            picked += take
            self.given += len(take)
            if self.given == len(present):
                self.epoch, self.given = self.epoch + 1, 0
        if not picked:
            raise EndOfData(f"the pairs ended after {self.epochs} epochs; ask for more epochs")
        return self._batch(picked)

    def _batch(self, picked: list[list[int]]) -> Batch:
        rows = [[self._tokens(self.examples[i]) for i in row] for row in picked]
        return assemble(rows, self.sequence_length, masked=True)

    def _tokens(self, example: Encoded) -> Tokens:
        targets_N = example.ids[1:].astype(np.int64)
        targets_N[: example.given - 1] = NO_LOSS
        return Tokens(example.ids[:-1], targets_N)

    def state(self) -> dict[str, Any]:
        return {
            "version": 1,
            "epoch": self.epoch,
            "rows": self.given,
            "seed": self.seed,
            "pairs": len(self.lengths),
            "tokens": sum(self.lengths),
            "sequence_length": self.sequence_length,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises UserError if the pairs are not those it was taken from."""
        now = self.state()
        changed = [k for k in ("pairs", "tokens", "sequence_length") if state.get(k) != now[k]]
        if changed:
            told = ", ".join(f"{k} was {state.get(k)} and is {now[k]}" for k in changed)
            raise UserError(f"cannot go on: {told}; give the same pairs, or another folder")
        self.epoch, self.given, self.seed = state["epoch"], state["rows"], state["seed"]
