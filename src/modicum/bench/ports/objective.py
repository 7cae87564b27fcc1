"""objective: held-out bits per byte, by plain next-token scoring, after equal tokens, against the seconds they took.

Whatever a method was trained on (spans, metadata), it is scored as a language model on plain text. Documents do not
see each other, for every method alike. Marks that an objective needs are added to the tokenizer, whose words and
merges stay the same, so that bits per byte compare.
"""

from __future__ import annotations

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("train_seconds", "lower", "s"))
LIMITS = training.LIMITS
TIER = "laptop"
NOT_MEASURABLE = {
    "first": "held-out text is scored by all layers; its routers leave layers out in answers, and are counted there"
}
Scale = training.Scale
QUICK = Scale(**training.QUICK)
PACKING = "concat:mask=true"


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings, reserved=registry.build("objective", choice).reserved())
    model = bench.model(seed)
    record = bench.model_record(model)
    stream = bench.stream(seed, packing=PACKING, objective=choice)
    result = bench.train(model, seed, stream, packing=PACKING, objective=choice)
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
