"""concat: put documents one after another and cut every `length` tokens.

    row k = tokens [k L, (k + 1) L) of the concatenation

No padding before the end of the data; a document that crosses a cut goes on in the next row, where it
has lost its earlier context. Brown et al. 2020 (arXiv:2005.14165, appendix B) attend across the
documents of a row, as here by default; mask=true keeps attention within each document, as
Grattafiori et al. 2024 (arXiv:2407.21783, section 3.2) do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modicum.core.registry import Capabilities
from modicum.data.batch import Span
from modicum.data.packings import Packing


@dataclass(frozen=True, kw_only=True)
class Config:
    mask: bool = False  # attention within documents only


TOY = Config(mask=True)


class Concat(Packing):
    def __init__(self, config: Config):
        super().__init__(config)
        self.masks_documents = config.mask

    @classmethod
    def capabilities(cls, config: Config) -> Capabilities:
        return Capabilities(provides=frozenset({"document_mask"} if config.mask else ()))

    def row(self, draw: Callable[[], Span | None], pending: list[Span], length: int) -> list[Span]:
        row: list[Span] = []
        free = length
        while free > 0:
            span = pending.pop(0) if pending else draw()
            if span is None:
                break
            if span.length > free:
                span, rest = span.split(free)
                pending.insert(0, rest)
            row.append(span)
            free -= span.length
        return row
