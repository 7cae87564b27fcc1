"""port packing: how documents become sequences of one length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from modicum.core.registry import Method

BASELINE = "concat"


class Piece(NamedTuple):
    """A run of predictions of one document: stored tokens start ... start+length-1 and those one later.

    Lengths only: a packing never sees tokens, so that its state is a few numbers.
    """

    domain: str
    document: int
    start: int
    length: int

    def split(self, length: int) -> tuple[Piece, Piece]:
        """The first `length` predictions and the rest."""
        rest = self._replace(start=self.start + length, length=self.length - length)
        return self._replace(length=length), rest


class Packing(Method):
    """Constructed as `cls(config)`; it keeps nothing but the `pending` list that it is handed.

    masks_documents: attention stays within a document; positions then begin at 0 for each.
    """

    masks_documents: bool = True

    def __init__(self, config: Any):
        self.config = config

    def row(self, draw: Callable[[], Piece | None], pending: list[Piece], length: int) -> list[Piece]:
        """The pieces of the next sequence, at most `length` predictions; the rest of it is padding.

        draw() gives the next document, or a stretch of a long one; None when the data has ended. What was
        drawn and not used stays in `pending`, which the stream saves. An empty list ends the data.
        """
        raise NotImplementedError
