"""What must hold for any order, on documents from shorter than a chunk to several chunks."""

from __future__ import annotations

import json

import numpy as np

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.data.orders import Epoch, chunk_ends
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream

CHUNK = 16


def _documents() -> MemoryDocuments:
    rng = np.random.default_rng(0)
    sizes = {"a": rng.integers(2, 80, 60), "b": rng.integers(2, 40, 25)}
    number = 0
    examples: dict[str, list[tuple[range, int]]] = {}
    for domain, lengths in sizes.items():
        for n in lengths.tolist():
            examples.setdefault(domain, []).append((range(number, number + n), 1))
            number += n
    quality = {d: rng.integers(0, 9, len(n)).astype(float) for d, n in sizes.items()}
    metadata = {d: [[1, 2]] * len(n) for d, n in sizes.items()}
    return MemoryDocuments(examples, quality=quality, metadata=metadata)


def _epoch(documents: MemoryDocuments, number: int, remaining: float | None = None) -> Epoch:
    lengths = documents.lengths("a") - 1
    return Epoch("a", number, 5, lengths, chunk_ends(lengths, CHUNK), CHUNK, remaining)


def _choice(key: str) -> Choice:
    return Choice("order", key)


def check_each_chunk_at_most_once(key: str) -> None:
    """Chunk numbers are there, differ from each other and are those of the epoch."""
    documents = _documents()
    for number, remaining in ((0, None), (3, None), (0, 100.0), (1, 5.0)):
        epoch = _epoch(documents, number, remaining)
        order = registry.build("order", _choice(key), documents).arrange(epoch)
        assert len(order) > 0 and len(set(order.tolist())) == len(order), f"{key}: a chunk comes twice, or none"
        assert order.min() >= 0 and order.max() < epoch.chunks, f"{key}: chunks that are not there"


def check_pure(key: str) -> None:
    """The same epoch gives the same order, whoever asks and whatever was asked before."""
    documents = _documents()
    first, second = (registry.build("order", _choice(key), documents) for _ in range(2))
    orders = [first.arrange(_epoch(documents, n)).tolist() for n in range(3)]
    again = [second.arrange(_epoch(documents, n)).tolist() for n in reversed(range(3))][::-1]
    assert orders == again, f"{key}: arrange() depends on more than the epoch"


def check_resumes_exactly(key: str) -> None:
    """A stream in this order goes on from its state with the same batches, whatever their size before."""

    def make() -> Stream:
        return Stream(_documents(), sequence_length=CHUNK, seed=1, total=4000, order=_choice(key))

    whole = make()
    batches = [whole.next_batch(2).tokens_BT.tolist() for _ in range(60)]
    for cut in (0, 7, 33):
        first = make()
        for _ in range(cut):
            first.next_batch(2)
        later = make()
        later.load_state(json.loads(json.dumps(first.state())))
        assert [later.next_batch(2).tokens_BT.tolist() for _ in range(cut, 60)] == batches[cut:], f"{key}: from {cut}"
