"""step: held-out bits per byte of a proxy trained for equal tokens on what the step left, against speed.

The held-out side is normalised by no step, so every method is judged on the same text. Megabytes per
second are those of one process over the whole training side.
"""

from __future__ import annotations

import time

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.document import Document, Drop
from modicum.data.steps import Context

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("megabytes_per_second", "higher", "MB/s"))
LIMITS = training.LIMITS
Scale = training.Scale
QUICK = Scale(**training.QUICK)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    step = registry.build("step", choice)
    corpus = fixtures.corpus(settings.data, settings.scale.corpus_bytes, settings.scale.heldout_bytes, parted=False)
    given = corpus.train
    start = time.perf_counter()
    step.open(Context(seed=seed))
    out = list(step.run(given))
    step.close()
    seconds = time.perf_counter() - start
    kept = [item for item in out if isinstance(item, Document)]
    if not kept:
        raise UserError(f"step {choice} dropped all {len(given)} documents; give other knobs or another corpus")
    model = bench.model(seed)
    record = bench.model_record(model)
    result = bench.train(model, seed, bench.stream(seed, kept))
    before = sum(d.nbytes for d in given)
    metrics = {
        "bits_per_byte": bench.bits(model, corpus.heldout_texts()),
        "megabytes_per_second": before / 1e6 / max(seconds, 1e-9),
        "kept_bytes": sum(d.nbytes for d in kept),
        "kept_share": sum(d.nbytes for d in kept) / before,
        "dropped_documents": sum(isinstance(item, Drop) for item in out),
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=seconds + result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=corpus.record,
    )
