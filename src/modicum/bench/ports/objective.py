"""objective: held-out bits per byte after equal tokens, against the seconds they took."""

from __future__ import annotations

from modicum.bench import training
from modicum.bench.harness import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("train_seconds", "lower", "s"))
LIMITS = training.LIMITS
Scale = training.Scale
QUICK = Scale(**training.QUICK)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    model = bench.model(seed)
    record = bench.model_record(model)
    result = bench.train(model, seed, objective=choice)
    metrics = {
        "bits_per_byte": bench.bits(model),
        "train_seconds": result.seconds,
        "train_loss": result.loss,
        "tokens": result.tokens,
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )
