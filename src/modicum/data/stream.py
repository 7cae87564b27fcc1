"""Deterministic batches of documents: order -> sampler -> transforms -> packing -> batch.

    order       (port)       chunks of a domain's documents in an epoch: shuffled, as stored, ascending by quality
    sampler     data.sampler the domain furthest behind its share of the mixture is drawn from
    packing     (port)       which spans make a row; rows of one batch have one length, batches may differ in it
    transforms  (port)       the tokens of each span: metadata before them, targets masked, weights beside them
    batch       data.batch   tokens, targets, documents, positions, extras

The state is what was consumed, not who consumed it: next_batch gives the global batch and each process
takes its rows, so a run goes on in the same order on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.batch import NO_LOSS, Batch, EndOfData, Span, Tokens, assemble
from modicum.data.packings import Packing
from modicum.data.sampler import Sampler
from modicum.data.shards import Documents
from modicum.data.transforms import Position, Source, Transform

VERSION = 3


class Stream:
    """Batches of `sequence_length` tokens a row from shards.

    mixture, packing, order, transforms: choices (`"fixed:weights={prose: 3}"`). epochs: None for no limit.
    total: tokens that the run will read, for what changes over the run. chunk: most predictions of one document that
    stand together in the order (default: sequence_length). padding: the token id that fills rows.
    """

    def __init__(
        self,
        documents: Documents,
        mixture: Any = "natural",
        packing: Any = "concat",
        *,
        sequence_length: int,
        seed: int = 0,
        epochs: int | None = None,
        total: float | None = None,
        chunk: int | None = None,
        order: Any = "shuffled",
        transforms: Sequence[Any] = (),
        padding: int = 0,
    ):
        if sequence_length < 1:
            raise UserError(f"sequence_length={sequence_length} must be at least 1")
        self.documents, self.sequence_length, self.padding = documents, sequence_length, padding
        self.epochs, self.total = epochs, total
        ports = [("mixture", mixture), ("packing", packing), ("order", order), *(("transform", t) for t in transforms)]
        self.choices = [Choice.parse(port, value) for port, value in ports]
        members = [compose.member(choice.port, choice) for choice in self.choices]
        compose.resolve(members, options={"document_mask": "choose packing concat:mask=true"})
        self.provides = frozenset().union(*(m.provides for m in members))
        self.sampler = Sampler(documents, seed=seed, chunk=chunk or sequence_length, epochs=epochs, total=total)
        self.sampler.mixture = registry.build("mixture", mixture, self.sampler.sizes)
        self.sampler.order = registry.build("order", order, documents)
        self.sampler.row = sequence_length
        self.packing: Packing = registry.build("packing", packing)
        source = Source(documents, sequence_length, total, seed)
        self.transforms: list[Transform] = [registry.build("transform", t, source) for t in transforms]
        self.pending: list[Span] = []
        self.given = 0  # tokens of the rows so far, padding and what transforms added included
        self.rows_given = 0

    @property
    def reserved(self) -> int:
        """Ids at the vocabulary's end that no text uses."""
        return self.documents.reserved

    @property
    def epoch_tokens(self) -> int:
        """Predictions in one pass over everything."""
        return sum(self.sampler.sizes.values())

    @property
    def done(self) -> int:
        """Predictions put into batches so far."""
        return self.sampler.consumed

    @property
    def progress(self) -> float | None:
        return None if self.total is None else self.given / self.total

    def next_batch(self, n: int) -> Batch:
        """The next `n` rows of the global order (as many tokens, in shorter rows, if the packing says so); fewer at
        the end, then EndOfData."""
        tokens = n * self.sequence_length
        self.packing.fill(self.sampler.draw, self.pending, self.sequence_length, tokens)
        length = self.packing.row_length(self.sequence_length, self.progress or 0.0, self.pending, tokens)
        rows: list[list[Tokens]] = []
        while len(rows) < n * self.sequence_length // length:
            spans = self.next_row(length)
            if not spans:
                break
            rows.append(self._tokens(spans))
            self._consume(spans, length)
        if not rows:
            raise EndOfData(
                f"the data ended after {self.done} tokens ({self.epochs} epochs of "
                f"{self.epoch_tokens}); ask for more epochs, or for fewer tokens"
            )
        return assemble(rows, length, masked=self.packing.masks_documents, padding=self.padding)

    def next_row(self, length: int) -> list[Span]:
        """The spans of the next row of `length` tokens; none when the data has ended."""
        draw = self._draw_within_row() if self.sampler.order.whole_rows else self.sampler.draw
        return self._fit(self.packing.row(draw, self.pending, length), length)

    def _draw_within_row(self) -> Callable[[], Span | None]:
        """Spans of one row of the order's own; then None, as if the data had ended."""
        begun = False

        def draw() -> Span | None:
            nonlocal begun
            if begun and not self.sampler.within_row:
                return None
            begun = True
            return self.sampler.draw()

        return draw

    def count_rows(self) -> int:
        """How many rows the data has left; the stream is used up. For streams with a number of epochs."""
        count = 0
        while spans := self.next_row(self.sequence_length):
            self._consume(spans, self.sequence_length)
            count += 1
        return count

    def _fit(self, row: list[Span], length: int) -> list[Span]:
        """The spans that have room once transforms have added theirs; the others go to the front of `pending`."""
        if not self.transforms:
            return row
        free, fitted = length, list[Span]()
        for number, span in enumerate(row):
            at = self._position(number)
            free -= sum(t.added(span, at) for t in self.transforms)
            if free >= span.length:
                fitted.append(span)
                free -= span.length
                continue
            late = row[number:]
            if free > 0 and (self.packing.splits or not fitted):
                first, late[0] = span.split(free)
                fitted.append(first)
            elif not fitted:
                raise UserError(f"transforms add more tokens than a row of {length} has; ask for longer rows")
            self.pending[:0] = late
            break
        return fitted

    def _position(self, number: int) -> Position:
        return Position(self.rows_given, number, self.progress, self.sampler.seed)

    def _tokens(self, spans: list[Span]) -> list[Tokens]:
        made = []
        for number, span in enumerate(spans):
            stored = self.documents.tokens(span.domain, span.document)
            stop = span.start + span.length
            targets = stored[span.start + 1 : stop + 1]
            given = self.documents.loss_start(span.domain, span.document) - 1 - span.start
            if given > 0:
                targets = targets.astype("int64")
                targets[:given] = NO_LOSS
            tokens = Tokens(stored[span.start : stop], targets)
            if self.transforms:  # shards store what is narrower; a transform may put any token or NO_LOSS in
                tokens = Tokens(tokens.tokens_N.astype("int64"), tokens.targets_N.astype("int64"))
                at = self._position(number)
                for transform in self.transforms:
                    tokens = transform.apply(tokens, span, at)
            made.append(tokens)
        return made

    def _consume(self, spans: list[Span], length: int) -> None:
        for span in spans:
            self.sampler.domains[span.domain].consumed += span.length
        self.given += length
        self.rows_given += 1

    def batches(self, n: int) -> Iterator[Batch]:
        """Batches until the data ends (never, if epochs is None)."""
        while True:
            try:
                batch = self.next_batch(n)
            except EndOfData:
                return
            yield batch

    def state(self) -> dict[str, Any]:
        """JSON-able: what the sampler drew, tokens and rows given, and the spans that were drawn and not consumed yet
        ([domain, document, start, length])."""
        return {
            "version": VERSION,
            "order": next(c.resolved() for c in self.choices if c.port == "order"),
            "given": self.given,
            "rows": self.rows_given,
            "pending": [list(span) for span in self.pending],
            **self.sampler.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, whose seed and chunks hold. Mixture, packing, sequence length may have changed.

        Raises UserError if the data or the order has: a domain may be new, but none gone or of another size.
        """
        if state.get("version") != VERSION:
            raise UserError(
                f"cannot go on: the data position has version {state.get('version')}, this modicum reads {VERSION}; "
                "start a new run folder"
            )
        now = self.state()["order"]
        if state["order"] != now:
            raise UserError(
                f"cannot go on: the stream was in {state['order']['method']} order and is now asked for "
                f"{now['method']}; give the same order, or start a new run folder"
            )
        self.sampler.load_state(state)
        self.given, self.rows_given = state["given"], state["rows"]
        self.pending = [Span(*span) for span in state["pending"]]
