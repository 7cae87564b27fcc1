"""scheduler: the request rate that the real engine sustains while tokens keep coming in time.

Requests arrive at random (exponential gaps); their lengths are log-normal, or those of a trace of real
requests given by --data (a piece of it per seed, lengths divided by `shorter`). The promise, the same for all
methods, is made from the engine's own speed: 99 in 100 gaps between tokens within five times a step of decodes
alone (Sarathi-Serve's strict SLO), and a median wait below `delay`. The largest rate that keeps it is
searched on the real engine, from where the simulator finds it; a method with a knob `tbt` is given the promise's.
Cost is the throughput when everything waits at the start. The model is fresh: its speed does not depend on
its weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.bench import fixtures
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import fingerprint
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model
from modicum.serve import traces
from modicum.serve.config import EngineConfig, cache_blocks
from modicum.serve.engine import Engine
from modicum.serve.pace import StepTime
from modicum.serve.simulate import SLO, Played, aimed, search, simulate, strict_tbt
from modicum.serve.simulate_engine import calibrate, play
from modicum.serve.traces import Trace

AXES = Axes(quality=Axis("rate", "higher", "1/s"), cost=Axis("tokens_per_second", "higher", "1/s"))
LIMITS: set[str] = set()
TIER = "laptop"
AT_ONCE = 1e9  # requests per second


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The engine's size and limits, and how many requests of which lengths (medians, in tokens)."""

    vocabulary: int = 8192
    width: int = 256
    layers: int = 6
    context: int = 2048
    requests: int = 100
    prompt: int = 130
    answer: int = 24
    spread: float = 0.8  # of the lengths' logarithms
    shorter: float = 8.0  # a trace's lengths are divided by this
    delay: float = 0.5  # seconds that the median request may wait
    steps: int = 200  # timed for the calibration
    tolerance: float = 0.06  # of the rate
    cache: str = "24ktok"
    batch_tokens: int = 512
    sequences: int = 32
    timer: str = "wall"  # cpu: steps are timed by CPU time, for one thread on a machine with other work


QUICK = Scale(
    vocabulary=256, width=32, layers=1, context=256, requests=12, prompt=20, answer=6, steps=50, tolerance=0.5,
    cache="2ktok", batch_tokens=64, sequences=8,
)  # fmt: skip


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    model, pace, tbt = prepared(scale, settings.model, settings.device, settings.data)
    slo = SLO(tbt=tbt, delay=scale.delay)
    trace = requests(scale, settings.data, seed)
    method = aimed(choice, slo)
    config = engine_config(scale, method)
    n_blocks = cache_blocks(config, model.config, model.dtype, model.device)
    limits = (config.block_size, n_blocks, config.max_batch_tokens, config.max_sequences)

    def simulated(rate: float, promise: SLO | None = slo) -> Played | None:
        return simulate(trace.at_rate(rate, seed), registry.build("scheduler", method, *limits), pace, promise)

    def on_engine(rate: float) -> Played | None:
        return play(Engine(model, None, config), trace.at_rate(rate, seed), seed, slo, scale.timer)

    at_once = play(Engine(model, None, config), trace.at_rate(AT_ONCE, seed), seed, by=scale.timer)
    at_once_simulated = simulated(AT_ONCE, None)
    assert at_once is not None and at_once_simulated is not None
    guess, _run = search(simulated, len(trace), slo, 1.0, 0.02)
    start = guess if 0 < guess < np.inf else 1.0
    rate, best = search(on_engine, len(trace), slo, start, scale.tolerance, 1.15)
    report = best.report(slo) if best else {}
    return Measurement(
        metrics={
            # No more than what is done when everything waits: a short trace can be over before a queue forms.
            "rate": float(min(rate, len(trace) / at_once.seconds)),
            "tokens_per_second": at_once.report()["tokens_per_second"],
            "rate_simulated": float(min(guess, len(trace) / at_once_simulated.seconds)),
            "tokens_per_second_simulated": at_once_simulated.report()["tokens_per_second"],
            "tbt_limit": tbt,
            "calibration_error": float(pace.about["error_median"]),
            "preemptions": at_once.preemptions,
        }
        | {
            name: float(report.get(name, -1.0))
            for name in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "tbt_p50", "tbt_p99", "goodput")
        },
        cost=Cost(seconds=at_once.seconds, tokens=int(trace.output_N.sum())),
        data={"name": trace.name, "checksum": fingerprint([trace.prompt_N.tolist(), trace.output_N.tolist()])},
        model=fixtures.model_record(model, settings.model or "small decoder, fresh"),
    )


def engine_config(scale: Scale, scheduler: Any = "fcfs") -> EngineConfig:
    return EngineConfig(
        cache=scale.cache,
        max_batch_tokens=scale.batch_tokens,
        max_sequences=scale.sequences,
        scheduler=scheduler,
        prefix_cache=False,
    )


@functools.lru_cache(maxsize=2)
def prepared(scale: Scale, name: str | None, device: str, data: str | None) -> tuple[Decoder, StepTime, float]:
    """The model, its step times, and the promised time between tokens; once for all methods and seeds."""
    if name:
        model = load_model(name, "float32", device)
    else:
        shape = llama_like(scale.vocabulary, scale.width, scale.layers, context_length=scale.context)
        model = Decoder(shape, fixtures.seeded(0)).to(device)
    pace = calibrate(model, engine_config(scale), steps=scale.steps, by=scale.timer)
    return model, pace, strict_tbt(pace, requests(scale, data, 0), scale.sequences)


def requests(scale: Scale, data: str | None, seed: int) -> Trace:
    """The seed's requests without arrivals: a piece of the trace, or log-normal lengths."""
    if data:
        whole = traces.read(data)
        first = int(np.random.default_rng(seed).integers(max(1, len(whole) - scale.requests)))
        trace = whole.window(first, min(scale.requests, len(whole))).shorter(scale.shorter)
    else:
        rng = np.random.default_rng(seed)
        prompt_N, output_N = (
            np.maximum(1, rng.lognormal(np.log(typical), scale.spread, scale.requests)).astype(np.int64)
            for typical in (scale.prompt, scale.answer)
        )
        trace = Trace("log-normal lengths", prompt_N, output_N)
    return trace.within(scale.context - 2)
