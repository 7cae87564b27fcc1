"""What holds for any packing."""

from __future__ import annotations

from collections.abc import Callable

from modicum.core import registry
from modicum.data.packings import Packing, Piece

LENGTH = 16
# From shorter than a row to several rows, with exact fits among them.
LENGTHS = [3, 16, 7, 50, 1, 15, 2, 33, 9, 9, 4, 16, 64, 5, 11, 1, 1, 30]


def _make(key: str) -> Packing:
    loaded = registry.load("packing", key)
    return loaded.cls(getattr(loaded.module, "TOY", loaded.config()))


def _source(start: int = 0) -> Callable[[], Piece | None]:
    pieces = iter([Piece("d", i, 0, n) for i, n in enumerate(LENGTHS)][start:])
    return lambda: next(pieces, None)


def _all_rows(packing: Packing) -> list[list[Piece]]:
    draw = _source()
    pending: list[Piece] = []
    rows: list[list[Piece]] = []
    while row := packing.row(draw, pending, LENGTH):
        rows.append(row)
        assert len(rows) < 1000, "rows never end"
    assert not pending, f"{len(pending)} pieces were drawn and never used"
    return rows


def check_exact_cover(key: str) -> None:
    """Every prediction of every document is in exactly one row, and no row is over-full."""
    seen: set[tuple[int, int]] = set()
    for row in _all_rows(_make(key)):
        assert 0 < sum(p.length for p in row) <= LENGTH, f"{key}: row {row}"
        for piece in row:
            assert piece.length > 0, f"{key}: empty piece {piece}"
            for t in range(piece.start, piece.start + piece.length):
                assert (piece.document, t) not in seen, f"{key}: prediction {t} of {piece.document} twice"
                seen.add((piece.document, t))
    everything = {(i, t) for i, n in enumerate(LENGTHS) for t in range(n)}
    assert seen == everything, f"{key}: predictions are missing: {sorted(everything - seen)[:5]}"


def check_resume(key: str) -> None:
    """A fresh packing, given the pending pieces and the rest of the documents, makes the same rows."""
    whole = _all_rows(_make(key))
    drawn = 0
    source = _source()

    def draw() -> Piece | None:
        nonlocal drawn
        piece = source()
        drawn += piece is not None
        return piece

    pending: list[Piece] = []
    first = _make(key)
    rows = [first.row(draw, pending, LENGTH) for _ in range(3)]
    second, rest, pending = _make(key), _source(drawn), [Piece(*p) for p in pending]
    while row := second.row(rest, pending, LENGTH):
        rows.append(row)
    assert rows == whole, f"{key}: rows differ after a restart"
