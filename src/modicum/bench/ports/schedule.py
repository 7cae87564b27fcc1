"""schedule: held-out bits per byte at equal tokens, of one run and of training that goes on with other data.

One run: on documents of mixed quality (in a share of them, `damaged`, words have their letters in disorder; how many
is the document's score), scored on clean text, at the end and half-way. The second figure shows what a schedule
gives to someone who stops early.

Going on: half of the tokens on one domain, then as many on another, each in a run of its own with the
schedule's knobs for that (`Schedule.FIRST`, `LATER`; others begin anew), both on clean text and scored on both
domains. A schedule with such knobs is judged by this: the mean over both domains, against what became of the first.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.document import Document
from modicum.data.shards import MemoryDocuments
from modicum.data.tokenizer import Tokenizer
from modicum.train.callback import Callback

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("half_way_bits_per_byte", "lower", "bits/byte"))
ONWARD = Axes(quality=Axis("onward_bits_per_byte"), cost=Axis("onward_old_bits_per_byte", "lower", "bits/byte"))
LIMITS = {"tokens"}
TIER = "laptop"
PART = 1000  # characters of the documents of mixed quality


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    damaged: float = 0.8  # share of the documents in which words have their letters in disorder


QUICK = Scale(**training.QUICK)


def axes_of(choice: Choice) -> Axes:
    cls: Any = registry.load("schedule", choice.method).cls
    return ONWARD if cls.FIRST or cls.LATER else AXES


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    model = bench.model(seed)
    record = bench.model_record(model)
    judged, plain = axes_of(choice), choice.method == registry.port("schedule").baseline
    if judged is ONWARD and not plain:
        return Measurement(metrics=onward(bench, choice, seed), model=record, data=bench.corpus.record)
    watch = HalfWay(bench)
    stream = bench.stream(seed, mixed(settings.data, settings.scale, seed, bench.tokenizer), schedule=choice)
    result = bench.train(model, seed, stream, schedule=choice, parts={"half-way": watch})
    metrics = {
        "bits_per_byte": bench.bits(model),
        "half_way_bits_per_byte": watch.bits,
        "train_loss": result.loss,
        "tokens": result.tokens,
        **(onward(bench, choice, seed) if plain else {}),
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )


def onward(bench: training.Bench, choice: Choice, seed: int) -> dict[str, float]:
    """Bits per byte on old and new data after a run on each, one after the other."""
    names = bench.corpus.domains
    cls: Any = registry.load("schedule", choice.method).cls
    if len(names) < 2:
        if not cls.LATER:
            return {}
        raise UserError(f"the data has one domain ({names[0]}) and going on to another needs two; give other --data")
    old, new = names[-1], names[0]
    tokens = bench.total // 2
    model = bench.model(seed)
    bits = {}
    for domain, more in ((old, cls.FIRST), (new, cls.LATER)):
        schedule = Choice("schedule", choice.method, choice.knobs | more)
        documents = clean(bench.settings.data, bench.scale, domain, bench.tokenizer)
        stream = bench.stream(seed, documents, tokens=tokens, schedule=schedule)
        bench.train(model, seed, stream, tokens=tokens, schedule=schedule)
        bits[domain] = bench.bits(model, bench.corpus.heldout_texts(old))
    fresh = bench.bits(model, bench.corpus.heldout_texts(new))
    return {
        "onward_bits_per_byte": statistics.fmean((bits[new], fresh)),
        "onward_old_bits_per_byte": bits[new],
        "onward_new_bits_per_byte": fresh,
        "onward_before_bits_per_byte": bits[old],
    }


@functools.lru_cache(maxsize=2)
def clean(data: str | None, scale: Scale, domain: str, tokenizer: Tokenizer) -> MemoryDocuments:
    """One domain as it is, every document as good as the other."""
    documents = fixtures.corpus(data, scale.corpus_bytes, scale.heldout_bytes).train
    return training.memory([with_quality(d, 1.0) for d in documents if d.domain == domain], tokenizer)


@functools.lru_cache(maxsize=2)
def mixed(data: str | None, scale: Scale, seed: int, tokenizer: Tokenizer) -> MemoryDocuments:
    """The corpus in parts of PART characters, `damaged` of them damaged, each to a degree of its own; quality = 1 -
    degree. Whole files would be few, and the best of them not like the rest."""
    rng = np.random.default_rng([seed, 9])
    parts = []
    for document in fixtures.corpus(data, scale.corpus_bytes, scale.heldout_bytes).train:
        for start in range(0, len(document.text), PART):
            degree = float(rng.random()) if rng.random() < scale.damaged else 0.0
            words = document.text[start : start + PART].split(" ")
            for at in np.flatnonzero(rng.random(len(words)) < degree):
                words[at] = "".join(rng.permutation(list(words[at])))
            parts.append(with_quality(dataclasses.replace(document, text=" ".join(words)), 1 - degree))
    return training.memory(parts, tokenizer)


def with_quality(document: Document, score: float) -> Document:
    return dataclasses.replace(document, meta=document.meta | {"quality": score})


class HalfWay(Callback):
    """Scores the model once, after half of the steps."""

    def __init__(self, bench: training.Bench):
        self.bench, self.bits = bench, float("nan")

    def after_step(self, trainer: Any) -> None:
        if trainer.steps_done == max(1, trainer.config.total_steps // 2):
            trainer.write_back()
            self.bits = self.bench.bits(trainer.model)
            trainer.model.train()
