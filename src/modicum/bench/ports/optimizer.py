"""optimizer: held-out bits per byte after equal tokens (or seconds), against the bytes of state.

The same fresh decoder, data order and batch for every method at one seed. As methods want different
learning rates, each is trained at every rate of `rates` (factors of the scale's `rate`) and the best counts;
seconds and FLOPs are those of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modicum.bench import training
from modicum.bench.harness import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("state_bytes", "lower", "bytes"))
LIMITS = training.LIMITS


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)


QUICK = Scale(**training.QUICK, rates=(1.0,))


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    found = []
    for factor in settings.scale.rates:
        model = bench.model(seed)
        record = bench.model_record(model)
        rate = factor * settings.scale.rate
        result = bench.train(model, seed, rate=rate, optimizer=choice)
        found.append((bench.bits(model), rate, result, record))
    bits, rate, result, record = min(found, key=lambda f: f[0])
    shapes = {name: tuple(p.shape) for name, p in bench.model(seed).named_parameters()}
    method: Any = registry.load("optimizer", choice.method).cls
    state = method.cost(choice.config(), shapes).peak_bytes
    metrics = {
        "bits_per_byte": bits,
        "state_bytes": state,
        "rate": rate,
        "train_seconds": result.seconds,
        "tokens": result.tokens,
        "train_loss": result.loss,
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )
