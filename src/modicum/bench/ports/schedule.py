"""schedule: held-out bits per byte at the end of the run and half-way through it, at equal tokens.

The second figure shows what a schedule gives to someone who stops early: one run, several horizons.
"""

from __future__ import annotations

from typing import Any

from modicum.bench import training
from modicum.bench.harness import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice
from modicum.train.part import Part

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("half_way_bits_per_byte", "lower", "bits/byte"))
LIMITS = training.LIMITS
Scale = training.Scale
QUICK = Scale(**training.QUICK)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    model = bench.model(seed)
    record = bench.model_record(model)
    watch = HalfWay(bench)
    result = bench.train(model, seed, schedule=choice, parts={"half-way": watch})
    metrics = {
        "bits_per_byte": bench.bits(model),
        "half_way_bits_per_byte": watch.bits,
        "train_loss": result.loss,
        "tokens": result.tokens,
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )


class HalfWay(Part):
    """Scores the model once, after half of the steps."""

    def __init__(self, bench: training.Bench):
        self.bench, self.bits = bench, float("nan")

    def after_step(self, trainer: Any) -> None:
        if trainer.steps_done == max(1, trainer.config.total_steps // 2):
            trainer.write_back()
            self.bits = self.bench.bits(trainer.model)
            trainer.model.train()
