"""kvmemory: what a document's memory adds to an answer, in nats a token, against the bytes that a document takes.

Documents are functions of the Python installation without the first sentence of their docstrings; the question is that
sentence, the answer the function's name. Functions of half of the modules train the memory, those of the other half
are written to the bank and asked about. A trained prefix also teaches the form of answers, whatever it is read from, so
the gain is against the same reader with another question's prefix: `other_nats` - `nats_per_token`. The seed draws
examples.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import fingerprint
from modicum.retrieve.memories import Example, prompt
from modicum.retrieve.pairs import split_by_article
from modicum.retrieve.prefix import FrozenReader, Prefix
from modicum.retrieve.sources import read_passages

AXES = Axes(quality=Axis("gain_nats", "higher"), cost=Axis("bytes_per_document", "lower", "bytes"))
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    documents: int = 100  # of the bank
    train: int = 600
    steps: int = 120
    batch: int = 8
    lr: float = 1e-3
    words: int = 60  # of a document


QUICK = Scale(**training.QUICK, documents=12, train=20, steps=2)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    reader = _reader(settings.model, settings.data, scale, settings.device)
    examples, stream, record = _material(settings.data, scale, seed)
    memory = registry.build("kvmemory", choice, reader)
    start = time.perf_counter()
    losses = memory.fit(examples, steps=scale.steps, batch=scale.batch, lr=scale.lr, seed=seed)
    fitted = time.perf_counter() - start
    start = time.perf_counter()
    memory.write([str(n) for n in range(len(stream))], [e.document for e in stream])
    written = time.perf_counter() - start
    prefix = memory.read([e.question for e in stream])
    own, other = (_nats(reader, p, stream) for p in (prefix, _turned(prefix)))
    return Measurement(
        metrics={
            "gain_nats": other - own,
            "nats_per_token": own,
            "other_nats": other,
            "bytes_per_document": memory.nbytes() / len(stream),
            "write_seconds": written / len(stream),
            "train_seconds": fitted,
            "loss": float(np.mean(losses[-10:])) if losses else 0.0,
        },
        cost=Cost(seconds=fitted + written),
        data=record,
    )


def _turned(prefix: Prefix | None) -> Prefix | None:
    """Every question with its neighbour's prefix."""
    return None if prefix is None else prefix.rows(torch.arange(len(prefix.k[0])).roll(1))


def _nats(reader: FrozenReader, prefix: Prefix | None, stream: list[Example]) -> float:
    values = []
    with torch.inference_mode():
        for n in range(0, len(stream), 16):
            part = stream[n : n + 16]
            rows = None if prefix is None else prefix.rows(range(n, n + len(part)))
            losses = reader.losses(rows, [prompt(e.question) for e in part], [e.answer for e in part])
            values += losses.tolist()
    return float(np.mean(values))


@functools.lru_cache(maxsize=1)
def _reader(model: str | None, data: str | None, scale: Scale, device: str) -> FrozenReader:
    if model:
        return FrozenReader.open(model, device)
    bench, small = training.pretrained(Settings(scale=scale, data=data, device=device), 0)
    return FrozenReader(small, bench.tokenizer)


def _material(source: str | None, scale: Scale, seed: int) -> tuple[list[Example], list[Example], dict[str, Any]]:
    rows = _functions(source)
    test_P = split_by_article([p.source.partition(":")[0] for p in rows], 0.5)
    rng = np.random.default_rng(seed)

    def drawn(mask: np.ndarray, count: int) -> list[Example]:
        chosen = rng.permutation(np.flatnonzero(mask))[:count]
        texts = [" ".join(rows[i].body.split()[: scale.words]) for i in chosen]
        return [Example(t, rows[i].summary, rows[i].title) for t, i in zip(texts, chosen, strict=True)]

    train, test = drawn(~test_P, scale.train), drawn(test_P, scale.documents)
    record = {"name": source or "python", "documents": len(test), "train": len(train)}
    return train, test, record | {"checksum": fingerprint([(p.title, p.body) for p in rows])}


@functools.lru_cache(maxsize=1)
def _functions(source: str | None) -> tuple[Any, ...]:
    """Documented functions whose text names them."""
    rows = (p for p in read_passages(source or "python") if p.summary and p.title and p.title in p.body)
    return tuple(p for _, p in zip(range(3000), rows, strict=False))
