"""mixup on few labelled texts, in the training of a LoRA adapter, with and without augmented copies (`labelled`)."""

from __future__ import annotations

from modicum.bench import labelled
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice

AXES = Axes(quality=Axis("accuracy", "higher"), cost=Axis("adapt_seconds", "lower", "s", against=""))


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    metrics, record, seconds = labelled.compare(choice, seed, settings)
    return Measurement(metrics=metrics | {"adapt_seconds": seconds}, cost=Cost(seconds=seconds), data=record, axes=AXES)
