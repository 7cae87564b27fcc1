"""Which document comes next: the order within each domain, and deficit round robin between domains.

    deficit_d += length w_d / sum(w)   for every domain with data left, when a span of `length` is drawn
    deficit_c -= length                for the domain c it was drawn from
    next:      the domain of the largest deficit

So the mixture holds at every moment to within one span, deterministically. A document longer than `chunk` takes part in
the order by chunks of that length, so that it does not fill batch after batch. The state records what was drawn and
consumed in each domain; a new mixture changes which domain comes next and nothing within a domain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.data.batch import Span
from modicum.data.mixtures import Mixture
from modicum.data.orders import Epoch, Order, chunk_ends
from modicum.data.shards import Documents

INSTANTS = 32


@dataclass
class Domain:
    """Where one domain is: `drawn` chunks of epoch `epoch`; `consumed` predictions put into batches.

    lengths: predictions of each document; ends: how many chunks it and those before it have.
    """

    name: str
    lengths: np.ndarray
    ends: np.ndarray
    epoch: int = 0
    drawn: int = 0
    consumed: int = 0
    deficit: float = 0.0
    order: np.ndarray | None = None  # chunk numbers of the present epoch
    rows: np.ndarray | None = None  # int64 [spans, 4]: document, start, length, row; for orders of whole rows

    @property
    def within_row(self) -> bool:
        """Whether the next span stands in the same row as the last one."""
        return self.rows is not None and self.drawn > 0 and self.rows[self.drawn, 3] == self.rows[self.drawn - 1, 3]

    @property
    def size(self) -> int:
        """Predictions of one epoch."""
        return int(self.lengths.sum())

    def span(self, number: int, chunk: int) -> Span:
        document = int(np.searchsorted(self.ends, number, side="right"))
        start = (number - (int(self.ends[document - 1]) if document else 0)) * chunk
        return Span(self.name, document, start, min(chunk, int(self.lengths[document]) - start))


class Sampler:
    """Draws spans. `mixture` and `order` are set by whoever makes it, once it has the domains' sizes."""

    mixture: Mixture
    order: Order

    def __init__(self, documents: Documents, *, seed: int, chunk: int, epochs: int | None, total: float | None):
        self.seed, self.chunk, self.epochs, self.total = seed, chunk, epochs, total
        self.horizon = total  # of the order: a longer run goes on in the order it began with
        self.row = chunk  # tokens of a row, for orders of whole rows
        self.domains: dict[str, Domain] = {}
        for name in documents.domains:
            lengths = documents.lengths(name) - 1
            if len(lengths) and int(lengths.sum()) > 0:
                self.domains[name] = Domain(name, lengths, chunk_ends(lengths, chunk))
        if not self.domains:
            raise UserError("the data has no tokens to train on; curate more text, or with fewer steps")
        self.sizes = {name: domain.size for name, domain in self.domains.items()}

    @property
    def consumed(self) -> int:
        """Predictions put into batches so far."""
        return sum(d.consumed for d in self.domains.values())

    @property
    def drawn_tokens(self) -> int:
        """Predictions drawn so far, whether they came into a batch or not."""
        total = 0
        for d in self.domains.values():
            total += d.epoch * d.size
            if d.drawn:
                spans = self._rows(d)[: d.drawn, 2] if self.order.whole_rows else self._sizes(d)[: d.drawn]
                total += int(spans.sum())
        return total

    def _sizes(self, domain: Domain) -> np.ndarray:
        return self._epoch(domain).sizes(self._arranged(domain).astype(np.int64))

    def _arranged(self, domain: Domain) -> np.ndarray:
        if domain.order is None:
            numbers = self.order.arrange(self._epoch(domain))
            domain.order = numbers.astype(np.uint32 if domain.ends[-1] < 1 << 32 else np.uint64)
        return domain.order

    def _rows(self, domain: Domain) -> np.ndarray:
        """The spans of an epoch: the order's chunks end to end, cut every `row` tokens, the rows shuffled."""
        if domain.rows is None:
            epoch = self._epoch(domain)
            spans = [domain.span(int(n), self.chunk) for n in self.order.arrange(epoch)]
            cut: list[tuple[int, int, int, int]] = []
            at = 0
            for span in spans:
                start, rest = span.start, span.length
                while rest:
                    size = min(rest, self.row - at % self.row)
                    cut.append((span.document, start, size, at // self.row))
                    at, start, rest = at + size, start + size, rest - size
            rows = np.array(cut, np.int64)
            rank = np.empty(-(-at // self.row), np.int64)
            rank[epoch.permutation(len(rank)).astype(np.int64)] = np.arange(len(rank))
            domain.rows = rows[np.argsort(rank[rows[:, 3]], kind="stable")]
        return domain.rows

    @property
    def within_row(self) -> bool:
        """Whether the last span's row goes on, for an order of whole rows."""
        return any(d.within_row for d in self.domains.values())

    def _epoch(self, domain: Domain) -> Epoch:
        remaining = None
        if self.horizon is not None:
            fraction = 0.0  # of the run's tokens that are this domain's, by the mixture at INSTANTS of the run
            for k in range(INSTANTS):
                weights = self.mixture.weights((k + 0.5) / INSTANTS * self.horizon, self.horizon)
                fraction += weights.get(domain.name, 0) / sum(weights.values()) / INSTANTS
            remaining = fraction * self.horizon - domain.epoch * self.sizes[domain.name]
        return Epoch(domain.name, domain.epoch, self.seed, domain.lengths, domain.ends, self.chunk, remaining)

    def draw(self) -> Span | None:
        """The next span of the order: of the domain with the largest deficit. None when the data has ended."""
        weights = self.mixture.weights(self.consumed, self.total)
        open_ = [
            d
            for d in self.domains.values()
            if weights.get(d.name, 0) > 0 and (self.epochs is None or d.epoch < self.epochs)
        ]
        if not open_:
            return None
        chosen = max(open_, key=lambda d: d.deficit)
        if self.order.whole_rows:
            for d in open_:
                if d.drawn:
                    self._rows(d)
            chosen = next((d for d in open_ if d.within_row), chosen)
            rows = self._rows(chosen)
            document, start, length, _ = rows[chosen.drawn].tolist()
            span, count = Span(chosen.name, document, start, length), len(rows)
        else:
            order = self._arranged(chosen)
            span, count = chosen.span(int(order[chosen.drawn]), self.chunk), len(order)
        chosen.drawn += 1
        if chosen.drawn == count:
            chosen.epoch, chosen.drawn, chosen.order, chosen.rows = chosen.epoch + 1, 0, None, None
        whole = sum(weights[d.name] for d in open_)
        for d in open_:
            d.deficit += span.length * weights[d.name] / whole
        chosen.deficit -= span.length
        return span

    def state(self) -> dict[str, Any]:
        """JSON-able: per domain its epoch, chunks drawn in it and predictions consumed in all."""
        domains = {
            d.name: {
                "epoch": d.epoch,
                "drawn": d.drawn,
                "tokens": d.consumed,
                "deficit": d.deficit,
                "of": [len(d.lengths), self.sizes[d.name]],
            }
            for d in self.domains.values()
        }
        row = {"row": self.row} if self.order.whole_rows else {}
        return {"seed": self.seed, "chunk": self.chunk, "horizon": self.horizon, "domains": domains} | row

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, whose seed, chunks and horizon hold. Raises `UserError` if the data is another: a
        domain may be new, but none gone or of another size."""
        for name, saved in state["domains"].items():
            domain = self.domains.get(name)
            if domain is None or [len(domain.lengths), self.sizes[name]] != list(saved["of"]):
                had = "{} documents, {} tokens".format(*saved["of"])
                have = "is gone" if domain is None else f"has {len(domain.lengths)}, {self.sizes[name]}"
                raise UserError(
                    f"cannot go on: domain {name!r} had {had} and now {have}; "
                    "give the same data, or start a new run folder"
                )
        self.seed, self.chunk, self.horizon = state["seed"], state["chunk"], state["horizon"]
        self.row = state.get("row", self.row)
        for name, domain in self.domains.items():
            saved = state["domains"].get(name, {})
            domain.ends, domain.order, domain.rows = chunk_ends(domain.lengths, self.chunk), None, None
            domain.epoch, domain.drawn = saved.get("epoch", domain.epoch), saved.get("drawn", domain.drawn)
            domain.consumed = saved.get("tokens", domain.consumed)
            domain.deficit = saved.get("deficit", domain.deficit)
