"""keep: every document goes on as it is.

    f(d) = d

The baseline that every other step is measured against.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from modicum.data.document import Document, Drop
from modicum.data.steps import Step


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Keep(Step):
    def each(self, document: Document) -> Iterable[Document | Drop]:
        yield document
