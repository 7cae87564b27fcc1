"""order: held-out bits per byte on clean text after one run over text of mixed quality, against the seconds it took.

In a share of the documents, `damaged`, words have their letters in disorder; how few is the document's score. An
order that keeps the best for the end loses it to a rate that has decayed by then, so every order is measured at a
constant rate with an average of the last checkpoints (the quality), and under a decayed rate beside it."""

from __future__ import annotations

from typing import Any

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import schedule
from modicum.budget import Cost
from modicum.core.choice import Choice

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("train_seconds", "lower", "s"))
LIMITS = {"tokens"}
TIER = "laptop"
Scale = schedule.Scale
QUICK = Scale(**training.QUICK)
RUNS: dict[str, dict[str, Any]] = {
    "bits_per_byte": {"schedule": "constant", "averaging": "lawa:weights=ema"},
    "decayed_bits_per_byte": {"schedule": "wsd"},
}


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    documents = schedule.mixed(settings.data, settings.scale, seed, bench.tokenizer)
    record = bench.model_record(bench.model(seed))
    metrics: dict[str, float] = {}
    seconds = flops = tokens = 0.0
    for name, methods in RUNS.items():
        model = bench.model(seed)
        stream = bench.stream(seed, documents, order=choice, **methods)
        result = bench.train(model, seed, stream, order=choice, **methods)
        metrics[name] = bench.bits(model)
        metrics.setdefault("train_seconds", result.seconds)
        metrics.setdefault("train_loss", result.loss)
        seconds, flops, tokens = seconds + result.seconds, flops + result.flops, tokens + result.tokens
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=seconds, flops=flops, tokens=tokens),
        model=record,
        data=bench.corpus.record,
    )
