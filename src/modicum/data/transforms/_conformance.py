"""What must hold for any transform, on documents of which every token is another."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import torch

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.data.batch import NO_LOSS, Batch
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import Stream

LENGTH = 24


def _documents() -> MemoryDocuments:
    number, examples, metadata = 100, [], []
    for i in range(40):
        n = 3 + (7 * i) % 60
        examples.append((range(number, number + n), 1))
        metadata.append([10 + i % 3, 20 + i % 5])
        number += n
    return MemoryDocuments({"a": examples}, metadata={"a": metadata}, quality={"a": range(40)}, reserved=40)


def _stream(key: str | None, **knobs: Any) -> Stream:
    transforms: list[Choice] = []
    if key is not None:
        toy = getattr(registry.load("transform", key).module, "TOY", None)
        transforms = [Choice("transform", key, dataclasses.asdict(toy) if toy else {})]
    settings: dict[str, Any] = {"sequence_length": LENGTH, "total": 3000, "seed": 2}
    return Stream(_documents(), "natural", "concat:mask=true", transforms=transforms, **settings | knobs)


def _text(batch: Batch) -> Counter[int]:
    """Tokens of the documents among a batch's inputs, each document's first left out."""
    return Counter(t for t in batch.tokens_BT.flatten().tolist() if t >= 100)


def check_rows(key: str) -> None:
    """Rows have their length; extras are a number a token; tokens keep their targets' and documents' shapes."""
    stream = _stream(key)
    for _ in range(10):
        batch = stream.next_batch(3)
        assert batch.tokens_BT.shape == batch.targets_BT.shape == (3, LENGTH), f"{key}: {batch.tokens_BT.shape}"
        for name, values in batch.extras.items():
            assert values.shape == batch.tokens_BT.shape and torch.isfinite(values).all(), f"{key}: {name}"
        assert batch.documents_BT is not None and (batch.targets_BT[batch.documents_BT < 0] == NO_LOSS).all()


def check_no_text_is_lost(key: str) -> None:
    """What a transform adds displaces text into the next row: an epoch has every document's tokens as without it."""
    plain, changed = Counter[int](), Counter[int]()
    for batch in _stream(None, epochs=1).batches(3):
        plain += _text(batch)
    for batch in _stream(key, epochs=1).batches(3):
        changed += _text(batch)
    missing = set(plain) - set(changed)
    assert not missing, f"{key}: tokens that are read without it and not with it: {sorted(missing)[:5]}"


def check_resumes_exactly(key: str) -> None:
    """A stream goes on from its state with the same batches; rows do not depend on the batch's size."""
    whole = _stream(key)
    batches = [whole.next_batch(2) for _ in range(40)]
    for cut in (1, 17, 31):
        first = _stream(key)
        first.next_batch(2 * cut)
        later = _stream(key)
        later.load_state(json.loads(json.dumps(first.state())))
        for batch in batches[cut:]:
            again = later.next_batch(2)
            same = torch.equal(again.tokens_BT, batch.tokens_BT) and torch.equal(again.targets_BT, batch.targets_BT)
            assert same and all(torch.equal(again.extras[n], x) for n, x in batch.extras.items()), f"{key}: from {cut}"
