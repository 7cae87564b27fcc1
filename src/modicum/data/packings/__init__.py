"""port packing: how documents become rows of tokens.

A row is a list of spans: runs of predictions of documents, of which a packing sees domain, number and length and never
the tokens, so that its state is a few numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from modicum.core.registry import Method
from modicum.data.batch import Span

BASELINE = "concat"


class Packing(Method):
    """Constructed as `cls(config)`; it keeps nothing but the `pending` list that it is handed.

    masks_documents: attention stays within a document; positions then begin at 0 for each. splits: a document may go
    on in another row.
    """

    masks_documents: bool = True
    splits: ClassVar[bool] = True

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def row(self, draw: Callable[[], Span | None], pending: list[Span], length: int) -> list[Span]:
        """The spans of the next row, at most `length` predictions; the rest of it is padding.

        draw() gives the next document, or a chunk of a long one; None when the data has ended. What was
        drawn and not used stays in `pending`, which the stream saves. An empty list ends the data.
        """

    def fill(self, draw: Callable[[], Span | None], pending: list[Span], longest: int, tokens: int) -> None:
        """Draw ahead into `pending` what the choice of a row length needs. Called before each batch, of `tokens`."""

    def row_length(self, longest: int, progress: float, pending: Sequence[Span] = (), tokens: int = 0) -> int:
        """Tokens of each row of the next batch, a divisor of `longest`; a batch has as many tokens whatever it is.

        progress: the share of the run that is done, 0 where its length is not known. pending: what was drawn and not
        used; tokens: of the batch.
        """
        return longest
