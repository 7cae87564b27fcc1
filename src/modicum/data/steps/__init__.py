"""port step: document filters, rewriters and deduplication between reading and tokenizing."""

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
    """Properties of the run that a step may use."""

    seed: int = 0


class Step(Method):
    """Constructed as `cls(config)`.

    A step of scope "document" processes one document at a time: it defines `each` (or `run`, for a stream).
    One of scope "corpus" compares documents: `signatures` describes each by a row of fixed width, in any
    process; `decide` gets all rows in reading order, in one process, and names those to drop. Neither may
    depend on how documents are batched or on Python's hash(); the pipeline counts, times and logs drops.
    """

    scope: ClassVar[Literal["document", "corpus"]] = "document"

    def __init__(self, config: Any):
        self.config = config

    def open(self, context: Context) -> None:
        """Called once in each process before its first document."""

    def each(self, document: Document) -> Iterable[Document | Drop]:
        """The output for one document: itself, others instead, or drops with a reason."""
        raise NotImplementedError

    def signatures(self, documents: Sequence[Document]) -> np.ndarray:
        """[documents, K], one row each."""
        raise NotImplementedError

    def decide(self, signatures_NK: np.ndarray, ids: Sequence[str]) -> dict[int, tuple[str, str]]:
        """{row: (reason, detail)} of the documents to drop. May be memory-mapped; N can be large."""
        raise NotImplementedError

    def run(self, documents: Iterable[Document]) -> Iterator[Document | Drop]:
        """The step over a stream of documents; a corpus step collects them all."""
        if self.scope == "document":
            for document in documents:
                yield from self.each(document)
            return
        collected = list(documents)
        drops = self.decide(self.signatures(collected), [d.id for d in collected])
        for i, document in enumerate(collected):
            yield Drop(document.id, *drops[i]) if i in drops else document

    def close(self) -> dict[str, float]:
        """Counters of the step, summed over processes. Called after the last document."""
        return {}
