"""whole: whole documents, one after another, and a new row where the next one does not fit.

For documents that are learnt as one thing, questions with their answers above all: none is cut, and none sees another.
The rest of a row is padding.

    row = d_i ... d_j   with  |d_i| + ... + |d_j| <= L < |d_i| + ... + |d_{j+1}|

Next-fit bin packing (Johnson 1973), in the order that documents come in; attention within each as in Krell et al. 2021,
arXiv:2107.02027, section 3.2. A document longer than a row is cut into rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modicum.data.batch import Span
from modicum.data.packings import Packing


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Whole(Packing):
    provides = frozenset({"document_mask"})
    splits = False

    def row(self, draw: Callable[[], Span | None], pending: list[Span], length: int) -> list[Span]:
        row: list[Span] = []
        free = length
        while free > 0:
            span = pending.pop(0) if pending else draw()
            if span is None:
                break
            if span.length > free:
                if not row:
                    span, rest = span.split(free)
                    row.append(span)
                    pending.insert(0, rest)
                else:
                    pending.insert(0, span)
                break
            row.append(span)
            free -= span.length
        return row
