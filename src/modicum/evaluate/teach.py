"""Training batches of which only the answers are learnt: for small decoders that must know a synthetic task.

A document is a list of (given, learnt) texts; the loss stands on the learnt ones and on the end token. Rows are filled
with whole documents, each with positions and attention of its own. Everything is drawn from (seed, batch).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.data.batch import NO_LOSS, Batch, Tokens, assemble
from modicum.data.tokenizer import Tokenizer

Document = list[tuple[str, str]]


class AnswerStream:
    """Batches for `train.loop.train` of what `make(rng)` draws. Raises UserError for a document longer than a row."""

    def __init__(
        self, make: Callable[[Random], Document], tokenizer: Tokenizer, *, sequence_length: int, seed: int | str = 0
    ):
        self.make, self.tokenizer, self.sequence_length = make, tokenizer, sequence_length
        self.seed, self.done = seed, 0

    def next_batch(self, n: int) -> Batch:
        rng = Random(f"teach/{self.seed}/{self.done}")
        self.done += 1
        rows: list[list[Tokens]] = []
        for _ in range(n):
            row: list[Tokens] = []
            left = self.sequence_length
            while True:
                span = self.span(self.make(rng))
                if len(span.tokens_N) > self.sequence_length:
                    raise UserError(
                        f"a document of {len(span.tokens_N)} tokens does not fit into a row of {self.sequence_length}; "
                        "raise sequence_length"
                    )
                if len(span.tokens_N) > left:
                    break  # drawn anew for the next row: short documents are a little more frequent at rows' ends
                row.append(span)
                left -= len(span.tokens_N)
            rows.append(row)
        return assemble(rows, self.sequence_length, masked=True, padding=self.tokenizer.pad_id)

    def span(self, document: Document) -> Tokens:
        ids, learns = [self.tokenizer.start_id], [False]
        for part, text in enumerate(text for pair in document for text in pair):
            encoded = self.tokenizer.encode(text, add_special=False)
            ids += encoded
            learns += [part % 2 == 1] * len(encoded)
        ids.append(self.tokenizer.eos_id)
        learns.append(True)
        return Tokens(np.array(ids[:-1]), np.where(learns[1:], ids[1:], NO_LOSS))

    def state(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
