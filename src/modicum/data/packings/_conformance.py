"""What holds for any packing."""

from __future__ import annotations

from collections.abc import Callable

from modicum.core import registry
from modicum.data.batch import Span
from modicum.data.packings import Packing

LENGTH = 16
# From shorter than a row to several rows, with exact fits among them.
LENGTHS = [3, 16, 7, 50, 1, 15, 2, 33, 9, 9, 4, 16, 64, 5, 11, 1, 1, 30]


def _make(key: str) -> Packing:
    loaded = registry.load("packing", key)
    return loaded.cls(getattr(loaded.module, "TOY", loaded.config()))


def _source(start: int = 0) -> Callable[[], Span | None]:
    spans = iter([Span("d", i, 0, n) for i, n in enumerate(LENGTHS)][start:])
    return lambda: next(spans, None)


def _row(packing: Packing, draw: Callable[[], Span | None], pending: list[Span]) -> list[Span]:
    """The next row as a stream asks for it, in batches of one."""
    packing.fill(draw, pending, LENGTH, LENGTH)
    return packing.row(draw, pending, packing.row_length(LENGTH, 0.0, pending, LENGTH))


def _all_rows(packing: Packing) -> list[list[Span]]:
    draw = _source()
    pending: list[Span] = []
    rows: list[list[Span]] = []
    while row := _row(packing, draw, pending):
        rows.append(row)
        assert len(rows) < 1000, "rows never end"
    assert not pending, f"{len(pending)} spans were drawn and never used"
    return rows


def check_exact_cover(key: str) -> None:
    """Every prediction of every document is in exactly one row, and no row is over-full."""
    seen: set[tuple[int, int]] = set()
    for row in _all_rows(_make(key)):
        assert 0 < sum(p.length for p in row) <= LENGTH, f"{key}: row {row}"
        for span in row:
            assert span.length > 0, f"{key}: empty span {span}"
            for t in range(span.start, span.start + span.length):
                assert (span.document, t) not in seen, f"{key}: prediction {t} of {span.document} twice"
                seen.add((span.document, t))
    everything = {(i, t) for i, n in enumerate(LENGTHS) for t in range(n)}
    assert seen == everything, f"{key}: predictions are missing: {sorted(everything - seen)[:5]}"


def check_resume(key: str) -> None:
    """A fresh packing, given the pending spans and the rest of the documents, makes the same rows."""
    whole = _all_rows(_make(key))
    drawn = 0
    source = _source()

    def draw() -> Span | None:
        nonlocal drawn
        span = source()
        drawn += span is not None
        return span

    pending: list[Span] = []
    first = _make(key)
    rows = [_row(first, draw, pending) for _ in range(3)]
    second, rest, pending = _make(key), _source(drawn), [Span(*p) for p in pending]
    while row := _row(second, rest, pending):
        rows.append(row)
    assert rows == whole, f"{key}: rows differ after a restart"
