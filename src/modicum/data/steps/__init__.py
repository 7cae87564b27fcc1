"""port step: document filters, rewriters and deduplication between reading and tokenizing."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from modicum.core.registry import Method
from modicum.data.document import Document, Drop
from modicum.data.signals import Signals

BASELINE = "keep"


@dataclass(frozen=True)
class Context:
    """Properties of the run that a step may use.

    signals: embeddings and losses, where the run has their makers. targets: texts that a selection is to resemble, by
    benchmark, for a step whose knobs name none. replies: the file that keeps a text generator's replies.
    """

    seed: int = 0
    signals: Signals = field(default_factory=Signals)
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    replies: Path | None = None


class Step(Method):
    """Constructed as `cls(config)`.

    A step of scope "document" processes one document at a time: it defines `each` (or `run`, for a stream).
    One of scope "corpus" compares documents: `signatures` describes each by a row of fixed width, in any
    process; `decide` gets all rows in reading order, in one process, and names those to drop. Neither may
    depend on how documents are batched or on Python's hash(); the pipeline counts, times and logs drops.

    A step with `sample` above 0 is *fitted*: `fit` gets so many of the documents that reach it, in one process, and its
    arrays are given to every process by `load` before the first document. relative: it keeps a fraction of what it
    gets, so that it would drop again from what it kept.
    """

    scope: Literal["document", "corpus"] = "document"
    relative: ClassVar[bool] = False
    signals: ClassVar[tuple[str, ...]] = ()  # that it cannot do without
    sample: int = 0  # documents that `fit` gets; 0: nothing to fit

    def __init__(self, config: Any):
        self.config = config
        self.context = Context()
        self.loaded = False

    def open(self, context: Context) -> None:
        """Called once in each process before its first document."""
        self.context = context

    def sources(self) -> Sequence[str]:
        """Files and folders beside the corpus that `fit` reads, as `readers.find` takes them."""
        return ()

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        """What the step learns from a sample, after `open`. The same sample gives the same arrays."""
        raise NotImplementedError

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `fit` gave, here or in another process."""
        self.loaded = True

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
        """The step over a stream of documents; a corpus step, and one that is not fitted yet, collects them all."""
        if self.sample and not self.loaded:
            documents = list(documents)
            self.load(self.fit(sampled(documents, self.sample)))
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


def sample_key(document_id: str) -> bytes:
    """Documents with the smallest keys are the sample: a choice by ids alone."""
    return hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8, person=b"sample").digest()


def sampled(documents: Iterable[Document], count: int) -> list[Document]:
    """`count` of the documents by a hash of their ids, in the order of the hashes; all, if there are fewer."""
    keyed = ((sample_key(d.id), d.id, number, d) for number, d in enumerate(documents))
    return [item[-1] for item in heapq.nsmallest(count, keyed, key=lambda item: item[:3])]
