"""step: bits per byte of a proxy trained for equal tokens on what the step left of a dirty pool, against speed.

The pool is the corpus' prose with exact and near duplicates, boilerplate, text of a foreign language and messy text
planted in it (`_dirty`), `dirt` of the corpus' bytes of each. How many of them a step finds, and how many clean
documents it loses, stands beside the loss. The held-out side is clean and normalised by no step, so every method is
judged on the same text; `clean_bits_per_byte`, measured beside the baseline, is what the corpus without the dirt gives:
nobody can gain more than lies between. A step that gives scores drops none; `ranked` says how often it scores a clean
document higher than a planted one. Megabytes per second are those of one process's CPU time over the pool; they have
no ratio, as the baseline does nothing.

Steps that keep a fraction of what they get are judged by what they chose (`_selecting`): those that aim at a target by
its bits per byte, others by the mean over domains, all at equal tokens of training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import _dirty, _selecting
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.document import Document, Drop
from modicum.data.steps import Context
from modicum.data.steps._selection import Selection

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("megabytes_per_second", "higher", "MB/s", against=""))
AIMED = Axes(quality=Axis("target_bits_per_byte"), cost=Axis("select_seconds", "lower", "s", against=""))
CHOOSING = Axes(quality=Axis("mean_bits_per_byte"), cost=Axis("select_seconds", "lower", "s", against=""))
LIMITS = training.LIMITS
TIER = "laptop"
NOT_MEASURABLE = {
    "python-split": "it sorts text into domains and drops none; what that is worth is the mixture's to say"
}


@dataclass(frozen=True, kw_only=True)
class Scale(_selecting.Scale):
    tokens: int = 150_000
    dirt: float = 0.15  # bytes of each kind of planted documents, of the corpus'


QUICK = Scale(**training.QUICK, **_selecting.QUICK)


def axes_of(choice: Choice) -> Axes:
    cls: Any = registry.load("step", choice.method).cls
    if not cls.relative:
        return AXES
    return AIMED if issubclass(cls, Selection) or hasattr(choice.config(), "targets") else CHOOSING


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    axes, plain = axes_of(choice), choice.method == registry.port("step").baseline
    if axes is AXES and not plain:
        return cleaned(choice, seed, bench)
    metrics, (seconds, flops, tokens) = _selecting.measure(choice, seed, bench, settings.scale)
    cost = Cost(seconds=seconds + metrics["select_seconds"], flops=flops, tokens=tokens)
    if plain:
        made = cleaned(choice, seed, bench)
        return dataclasses.replace(made, metrics=metrics | made.metrics)
    model = bench.model_record(bench.model(seed))
    return Measurement(metrics=metrics, cost=cost, model=model, data=bench.corpus.record, axes=axes)


def cleaned(choice: Choice, seed: int, bench: training.Bench) -> Measurement:
    """What the step leaves of a dirty pool."""
    step = registry.build("step", choice)
    clean, heldout = prose(bench.corpus.train), [d.text for d in prose(bench.corpus.heldout)]
    pool = _dirty.plant(clean, bench.settings.scale.dirt, seed)
    start = time.process_time()
    step.open(Context(seed=seed))
    out = list(step.run(pool))
    step.close()
    seconds = time.process_time() - start
    kept = [item for item in out if isinstance(item, Document)]
    if not kept:
        raise UserError(f"step {choice} dropped all {len(pool)} documents; give other knobs or another corpus")
    model = bench.model(seed)
    record = bench.model_record(model)
    result = bench.train(model, seed, bench.stream(seed, kept))
    before = sum(d.nbytes for d in pool)
    metrics = {
        "bits_per_byte": bench.bits(model, heldout),
        "megabytes_per_second": before / 1e6 / max(seconds, 1e-9),
        "kept_share": sum(d.nbytes for d in kept) / before,
        "dropped_documents": sum(isinstance(item, Drop) for item in out),
        **_dirty.recovered(pool, kept),
    }
    if choice.method == registry.port("step").baseline:
        other = bench.model(seed)
        bench.train(other, seed, bench.stream(seed, clean))
        metrics["clean_bits_per_byte"] = bench.bits(other, heldout)
    if all(d.quality is not None for d in kept):
        metrics["ranked"] = ranked(kept)
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=seconds + result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )


def prose(documents: Sequence[Document]) -> list[Document]:
    """Those that are not code, or all where there is nothing else: what is planted is made of sentences."""
    return [d for d in documents if d.domain != "code"] or list(documents)


def ranked(documents: Sequence[Document]) -> float:
    """How often a clean document is scored higher than boilerplate or a foreign language; a tie counts half."""
    bad = np.array([d.quality for d in documents if d.meta.get("planted") in ("boilerplate", "foreign")])
    good = np.array([d.quality for d in documents if "planted" not in d.meta])
    higher = (good[:, None] > bad[None]).mean() + 0.5 * (good[:, None] == bad[None]).mean()
    return float(higher)
