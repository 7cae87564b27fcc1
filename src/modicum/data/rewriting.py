"""Runs a rewriter over documents: many of them at once, so that the generator works on full batches.

A rewriter is a generator function: it yields the requests of one round, is sent their replies, and returns what becomes
of the document. Documents come out in the order in which they went in, and nothing depends on how they were batched: a
request's seed follows from its document, its round and its number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from modicum.core.errors import ModicumError
from modicum.data.document import Document, Drop
from modicum.data.replies import ERROR, Replies, Reply, Request
from modicum.data.rewrites import Rewriter

WINDOW = 64  # documents at once
NO_REPLY = "no-reply"  # the reason of documents that the generator failed on


def rewrite(
    rewriter: Rewriter,
    documents: Iterable[Document],
    replies: Replies | None = None,
    seed: int = 0,
    counts: Counter[str] | None = None,
) -> Iterator[Document | Drop]:
    """What `rewriter` makes of `documents`. counts: takes the requests, and the replies that are new.

    A document that the generator fails on stays as it is, beside a `Drop` of its rewriting that says why; one whose
    rewriter replaces what must not stay (`keeps_original` is false) is dropped. Raises `ModicumError` with the
    document's id where a rewriter fails.
    """
    counts = Counter() if counts is None else counts
    source = iter(documents)
    while window := list(itertools.islice(source, WINDOW)):
        runs = [_Run(rewriter, document, seed) for document in window]
        while waiting := [run for run in runs if run.requests]:
            if replies is None:
                raise ModicumError(f"rewriter {rewriter.key} asks for replies, and there is no generator")
            requests = [request for run in waiting for request in run.requests]
            counts["requests"] += len(requests)
            before = replies.generated
            answers = iter(replies(requests))
            counts["generated"] += replies.generated - before
            for run in waiting:
                run.send(list(itertools.islice(answers, len(run.requests))))
        for run in runs:
            yield from run.result


class _Run:
    """One document on its way: the requests that wait for replies, or the result."""

    def __init__(self, rewriter: Rewriter, document: Document, seed: int):
        self.rewriter, self.document, self.seed, self.round = rewriter, document, seed, 0
        self.requests: list[Request] = []
        self.result: list[Document | Drop] = []
        digest = hashlib.blake2b(document.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self.number = int.from_bytes(digest, "little")
        self.coroutine = rewriter.rewrite(document, np.random.default_rng([seed, self.number]))
        self._advance(None)

    def send(self, replies: list[Reply]) -> None:
        failed = next((reply for reply in replies if reply.ended == ERROR), None)
        if failed is None:
            self._advance(replies)
            return
        self.coroutine.close()
        self.requests = []
        if self.rewriter.keeps_original:
            self.result = [self.document, Drop(f"{self.document.id}#{self.rewriter.key}", NO_REPLY, failed.text)]
        else:
            self.result = [Drop(self.document.id, NO_REPLY, failed.text)]

    def _advance(self, replies: list[Reply] | None) -> None:
        try:
            requests = next(self.coroutine) if replies is None else self.coroutine.send(replies)
            while not requests:
                requests = self.coroutine.send([])
        except StopIteration as stop:
            self.requests, self.result = [], stop.value
        except ModicumError:
            raise
        except Exception as error:
            raise ModicumError(
                f"rewriter {self.rewriter.key} failed on document {self.document.id!r}: {type(error).__name__}: {error}"
            ) from error
        else:
            self.requests = [self._seeded(request, k) for k, request in enumerate(requests)]
            self.round += 1

    def _seeded(self, request: Request, k: int) -> Request:
        if request.seed is not None:
            return request
        text = f"{self.seed}/{self.number}/{self.round}/{k}"
        digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
        return dataclasses.replace(request, seed=int.from_bytes(digest, "little") >> 1)
