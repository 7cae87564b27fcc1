"""port step: what is done to documents between reading and tokenizing: keep, rewrite or drop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from modicum.core.registry import Method
from modicum.data.document import Document, Drop

BASELINE = "keep"


@dataclass(frozen=True)
class Context:
    """What a step may know of the run."""

    seed: int = 0


class Step(Method):
    """Constructed as `cls(config)`.

    A step of scope "document" looks at one document at a time: it writes `each` (or `run`, for a stream).
    One of scope "corpus" compares documents: `signatures` describes each in a row of fixed width, in any
    process; `decide` sees all rows in reading order, in one place, and names those to drop. Neither may
    depend on how documents are batched or on Python's hash(); the pipeline counts, times and keeps drops.
    """

    scope: ClassVar[Literal["document", "corpus"]] = "document"

    def __init__(self, config: Any):
        self.config = config

    def open(self, context: Context) -> None:
        """Called once in each process before its first document."""

    def each(self, document: Document) -> Iterable[Document | Drop]:
        """What becomes of one document: itself, others instead, or drops with a reason."""
        raise NotImplementedError

    def signatures(self, documents: Sequence[Document]) -> np.ndarray:
        """[documents, K], one row each."""
        raise NotImplementedError

    def decide(self, signatures_NK: np.ndarray, ids: Sequence[str]) -> dict[int, tuple[str, str]]:
        """{row: (reason, detail)} of the documents to drop. May be memory-mapped; N can be large."""
        raise NotImplementedError

    def run(self, documents: Iterable[Document]) -> Iterator[Document | Drop]:
        """The step over a stream of documents; a corpus step holds them all."""
        if self.scope == "document":
            for document in documents:
                yield from self.each(document)
            return
        held = list(documents)
        drops = self.decide(self.signatures(held), [d.id for d in held])
        for i, document in enumerate(held):
            yield Drop(document.id, *drops[i]) if i in drops else document

    def close(self) -> dict[str, float]:
        """Figures of the step's own, summed over processes. Called after the last document."""
        return {}
