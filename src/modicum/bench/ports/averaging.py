"""averaging: held-out bits per byte of the weights that a run ends with, against the seconds they took.

Averaging takes the noise out of the last steps, and so does a decaying rate. So each method is measured at a constant
rate, where nothing else does it (the quality), and under a decayed one beside it: what an average adds there, and
whether constant with an average comes near to decayed without.
"""

from __future__ import annotations

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("train_seconds", "lower", "s"))
LIMITS = {"tokens"}
TIER = "laptop"
Scale = training.Scale
QUICK = Scale(**training.QUICK)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    decayed = bench.model(seed)
    record = bench.model_record(decayed)
    bench.train(decayed, seed, schedule="wsd", averaging=choice)
    model = bench.model(seed)
    result = bench.train(model, seed, schedule="constant", averaging=choice)
    metrics = {
        "bits_per_byte": bench.bits(model),
        "train_seconds": result.seconds,
        "decayed_bits_per_byte": bench.bits(decayed),
        "train_loss": result.loss,
        "tokens": result.tokens,
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )
