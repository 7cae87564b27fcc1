"""surgery: held-out bits per byte after equal training FLOPs, against the parameters that are left.

Every method trains the same fresh decoder on the same order of data for as many tokens as bring its FLOPs,
counted as its paper counts, to those of a dense run of `tokens`. A method that spends fewer FLOPs on a token sees more
of them, and at any budget that a bench can pay a dense decoder of fewer layers gains by that too. So the baseline is
the best dense decoder for those FLOPs: of `depths`, the one with the fewest bits on a seed that is not reported
(`baseline_layers`). Beside it stand the dense decoder of full depth (`deep_bits_per_byte`), the same with the share
`fewer` of the tokens, and with `longer` times the tokens, if that is not 0.

`flops_to_baseline` is the share of the FLOPs after which a method's held-out loss has come down to where the dense run
of full depth ends (1 or more: not before the end); both follow a schedule made for the whole run, so that this is the
harder way to compare.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Any

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice
from modicum.data.stream import Stream
from modicum.train.callback import Callback
from modicum.train.config import TrainConfig
from modicum.train.evaluate import batches_of, mean_loss
from modicum.train.forecast import run_flops
from modicum.train.loop import Trainer, TrainResult

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("nonzero_parameters", "lower", "parameters"))
LIMITS = {"tokens"}
TIER = "laptop"
DENSE = Choice("surgery", "none")


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    """`tokens` are those of dense training. Deep and narrow: stacking and pruning act on layers, not on tables."""

    tokens: int = 200_000
    layers: int = 8
    depths: tuple[int, ...] = (1, 2, 4, 8)  # of the dense decoders that the baseline is the best of
    fewer: float = 0.45
    longer: float = 0.0
    tuning_seed: int = 1000
    curve_points: int = 8  # held-out losses along a run
    curve_sequences: int = 32  # in each of them


QUICK = Scale(**training.QUICK | {"layers": 4}, depths=(4,), fewer=0.0, curve_points=4, curve_sequences=4)


class Curve(Callback):
    """Held-out losses along a run: (FLOPs, loss) pairs."""

    def __init__(self, bench: training.Bench):
        scale: Any = bench.scale
        self.points, self.curve = scale.curve_points, [(0.0, float("inf"))]
        heldout = training.memory(bench.corpus.heldout, bench.tokenizer)
        stream = Stream(heldout, sequence_length=scale.sequence_length, seed=0, epochs=1)
        self.batches = list(batches_of(stream, 16, scale.curve_sequences))

    def after_step(self, trainer: Any) -> None:
        assert isinstance(trainer, Trainer)
        done, total = trainer.steps_done, trainer.config.total_steps
        if done == total or done * self.points // total > (done - 1) * self.points // total:
            began = time.perf_counter()
            self.curve.append((trainer.flops, mean_loss(trainer.model, self.batches)))
            trainer.seconds -= time.perf_counter() - began  # the step's own time is what counts

    def reaches(self, loss: float) -> float:
        """FLOPs at which the curve first falls to `loss`, between points by a straight line; inf if never."""
        for (before, high), (after, low) in zip(self.curve, self.curve[1:], strict=False):
            if low <= loss:
                fraction = 0.0 if high == float("inf") else (high - loss) / max(high - low, 1e-12)
                return before + fraction * (after - before)
        return float("inf")


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    bench = training.Bench.of(settings)
    record = bench.model_record(bench.model(seed))
    dense = _dense(settings, seed)
    budget, target = dense[1].flops, dense[2].curve[-1][1]
    more: dict[str, float] = {}
    if choice == DENSE:
        layers = _depth(settings)
        model, result, curve = dense if layers == bench.scale.layers else _shallow(settings, seed, layers, budget)
        more = {"deep_bits_per_byte": bench.bits(dense[0]), "baseline_layers": float(layers)}
        for name in ("fewer", "longer"):
            if fraction := getattr(bench.scale, name):
                other, _, _ = _run(bench, DENSE, seed, int(fraction * bench.total))
                more[f"{name}_bits_per_byte"] = bench.bits(other)
    else:
        model, result, curve = _run(bench, choice, seed, equal_tokens(bench, choice, budget))
    metrics = {
        "bits_per_byte": bench.bits(model),
        "nonzero_parameters": sum(int((p != 0).sum()) for p in model.parameters()),
        "average_parameters": result.average_parameters or 0.0,
        "flops_to_baseline": min(curve.reaches(target) / budget, 9.0),
        "train_flops": result.flops,
        "tokens": result.tokens,
        "train_seconds": result.seconds,
        **more,
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=result.seconds, flops=result.flops, tokens=result.tokens),
        model=record,
        data=bench.corpus.record,
    )


@functools.lru_cache(maxsize=1)
def _dense(settings: Settings, seed: int) -> tuple[Any, TrainResult, Curve]:
    bench = training.Bench.of(settings)
    return _run(bench, DENSE, seed, bench.total)


def _shallow(settings: Settings, seed: int, layers: int, budget: float) -> tuple[Any, TrainResult, Curve]:
    """A dense decoder of fewer layers, trained on as many tokens as the FLOPs pay for."""
    bench = training.Bench.of(dataclasses.replace(settings, scale=dataclasses.replace(settings.scale, layers=layers)))
    return _run(bench, DENSE, seed, equal_tokens(bench, DENSE, budget))


@functools.lru_cache(maxsize=4)
def _depth(settings: Settings) -> int:
    """The number of layers whose dense decoder is best at these FLOPs, on the tuning seed."""
    scale: Scale = settings.scale
    if len(scale.depths) == 1:
        return scale.depths[0]
    bench = training.Bench.of(settings)
    budget = run_flops(bench.model(0), _config(bench, DENSE))
    return min(scale.depths, key=lambda k: bench.bits(_shallow(settings, scale.tuning_seed, k, budget)[0]))


def _run(bench: training.Bench, choice: Choice, seed: int, tokens: int) -> tuple[Any, TrainResult, Curve]:
    model, curve = bench.model(seed), Curve(bench)
    stream = bench.stream(seed, tokens=tokens)
    result = bench.train(model, seed, stream, tokens=tokens, parts={"curve": curve}, surgery=choice)
    return model, result, curve


def _config(bench: training.Bench, choice: Choice) -> TrainConfig:
    scale = bench.scale
    return TrainConfig(
        tokens=bench.total,
        sequence_length=scale.sequence_length,
        batch_sequences=scale.batch_sequences,
        dtype=scale.dtype,
        device=bench.settings.device,
        surgery=choice,
    )


def equal_tokens(bench: training.Bench, choice: Choice, budget: float) -> int:
    """Tokens, in whole steps, after which a run with this surgery has counted about `budget` FLOPs."""
    size = bench.scale.sequence_length * bench.scale.batch_sequences
    config = _config(bench, choice)
    steps = config.total_steps
    for _ in range(8):  # schedules in tokens make FLOPs not quite proportional to the length
        flops = run_flops(bench.model(0), dataclasses.replace(config, tokens=steps * size))
        better = max(round(steps * budget / flops), 1)
        if better == steps:
            break
        steps = better
    return steps * size
