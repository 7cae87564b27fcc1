"""optimizer: held-out bits per byte after equal tokens (or seconds), against the bytes of optimizer state.

The same fresh decoder, data order and batch for every method at one seed. Methods want different learning
rates, and a baseline that was not tuned proves nothing: so each method, the baseline first, has its peak rate
and its weight decay searched in the same way, on `tuning_seed`, which is never among the seeds reported; all
reported seeds then run with what was found. The search tries `rates` (factors of the scale's `rate`), goes on
by the same ratio while the best lies at the edge (at most `widen` times), and then tries `decays` at the best
rate. What it cost is reported beside the result: `search_runs`, `search_seconds`. It is made once per
process, and gives the same when made again.

A method that needs factors (`requires = {"factors"}`) trains the same decoder with `form` in its layers. State
is what the optimizer held at most; seconds and FLOPs are those of one run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.train.callback import Callback
from modicum.train.loop import TrainResult

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("state_bytes", "lower", "bytes"))
LIMITS = training.LIMITS
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    decays: tuple[float, ...] = ()  # none: each method's own; a proxy this small does not tell them apart
    widen: int = 1
    tuning_seed: int = 1000
    form: str = "sltrain:rank=24"


QUICK = Scale(**training.QUICK, rates=(1.0,), decays=(), form="sltrain:rank=8")


@dataclass(frozen=True)
class Tuned:
    """What the search found, and what it cost. `decay` is None where the method's own stays."""

    factor: float
    decay: float | None
    runs: int = 0
    seconds: float = 0.0


class Gauge(Callback):
    """Keeps the most bytes of state that the optimizer held."""

    bytes = 0

    def after_step(self, trainer: Any) -> None:
        self.bytes = max(self.bytes, trainer.optimizer.state_bytes())


_tuned: dict[tuple[str, Settings], Tuned] = {}


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale = settings.scale
    if seed == scale.tuning_seed:
        raise UserError(f"seed {seed} is the one that rates are tuned on; report others, or give --scale tuning_seed=N")
    tuned = tune(choice, settings)
    bench = training.Bench.of(settings)
    bits, result, gauge = _run(bench, choice, seed, tuned.factor, tuned.decay)
    decay = tuned.decay if tuned.decay is not None else getattr(choice.config(), "weight_decay", 0.0)
    metrics = {
        "bits_per_byte": bits,
        "state_bytes": gauge.bytes,
        "rate": tuned.factor * scale.rate,
        "weight_decay": decay,
        "search_runs": tuned.runs,
        "search_seconds": tuned.seconds,
        "train_seconds": result.seconds,
        "tokens": result.tokens,
        "train_loss": result.loss,
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=bench.model_record(bench.model(seed)),
        data=bench.corpus.record,
    )


def tune(choice: Choice, settings: Settings) -> Tuned:
    """The method's best rate and decay on the tuning seed; remembered, as every reported seed asks."""
    key = (str(choice), settings)
    if key not in _tuned:
        scale, bench = settings.scale, training.Bench.of(settings)
        spent = []

        def bits(factor: float, decay: float | None) -> float:
            try:
                bits_per_byte, result, _ = _run(bench, choice, scale.tuning_seed, factor, decay)
            except UserError:
                raise
            except ModicumError:  # it diverged at this rate
                return math.inf
            spent.append(result.seconds)
            return bits_per_byte

        own = "weight_decay" not in choice.knobs and hasattr(choice.config(), "weight_decay")
        factor, decay, runs = search(bits, scale.rates, scale.decays if own else (), scale.widen)
        _tuned[key] = Tuned(factor, decay, runs, sum(spent))
    return _tuned[key]


def search(
    bits: Callable[[float, float | None], float],
    rates: tuple[float, ...],
    decays: tuple[float, ...],
    widen: int,
) -> tuple[float, float | None, int]:
    """(rate factor, decay or None for the method's own, runs made) with the fewest bits.

    Nothing is run where there is nothing to choose. Raises `UserError` where every rate diverges.
    """
    if not rates or min(rates) <= 0:
        raise UserError(f"rates={list(rates)} must be positive factors of the rate; write rates=[0.3, 1, 3]")
    if len(rates) == 1 and len(decays) < 2:
        return rates[0], decays[0] if decays else None, 0
    tried: dict[tuple[float, float | None], float] = {(f, None): bits(f, None) for f in sorted(rates)}
    runs = len(tried)
    ratio = (max(rates) / min(rates)) ** (1 / (len(rates) - 1)) if len(rates) > 1 else 1.0
    for _ in range(widen if ratio > 1 else 0):
        best = min(tried, key=lambda point: tried[point])[0]
        factors = [factor for factor, _ in tried]
        if min(factors) < best < max(factors):
            break
        further = best * ratio if best == max(factors) else best / ratio
        tried[further, None] = bits(further, None)
        runs += 1
    best = min(tried, key=lambda point: tried[point])[0]
    for decay in decays:
        tried[best, decay] = bits(best, decay)
        runs += 1
    factor, chosen = min(tried, key=lambda point: tried[point])
    if not math.isfinite(tried[factor, chosen]):
        listed = ", ".join(f"{f:g}" for f in sorted({f for f, _ in tried}))
        raise UserError(f"training diverged at every rate tried ({listed} times the scale's); lower --scale rate")
    return factor, chosen, runs


def _run(
    bench: training.Bench, choice: Choice, seed: int, factor: float, decay: float | None
) -> tuple[float, TrainResult, Gauge]:
    """One training run: held-out bits per byte, what the loop says of it, and the optimizer's state."""
    knobs = choice.knobs | ({} if decay is None else {"weight_decay": decay})
    method: Any = registry.load("optimizer", choice.method).cls
    form = bench.settings.scale.form if "factors" in method.requires else None
    model, gauge = bench.model(seed), Gauge()
    result = bench.train(
        model,
        seed,
        rate=factor * bench.scale.rate,
        optimizer=dataclasses.replace(choice, knobs=knobs),
        parts={"gauge": gauge},
        **({"form": form} if form else {}),
    )
    return bench.bits(model), result, gauge
