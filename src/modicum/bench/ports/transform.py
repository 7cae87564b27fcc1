"""transform: held-out bits per byte, by plain next-token scoring, after equal tokens of batch, against their seconds.

Whatever a transform does to what is read in training, the model is scored on plain text. What it adds counts as tokens,
since it costs as much; how many tokens were text is reported beside. Documents do not see each other.
"""

from __future__ import annotations

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("train_seconds", "lower", "s"))
LIMITS = training.LIMITS
TIER = "laptop"
Scale = training.Scale
QUICK = Scale(**training.QUICK)
PACKING = "concat:mask=true"


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    model = bench.model(seed)
    record = bench.model_record(model)
    stream = bench.stream(seed, packing=PACKING, transform=choice)
    result = bench.train(model, seed, stream, packing=PACKING, transform=choice)
    metrics = {
        "bits_per_byte": bench.bits(model),
        "train_seconds": result.seconds,
        "train_loss": result.loss,
        "tokens": result.tokens,
        "text_tokens": float(stream.done),
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )
