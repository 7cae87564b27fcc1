"""The real engine beside the simulator: measuring its step times, and playing a trace on it.

`calibrate` times steps of random composition (pieces of prompts behind any context, decodes with any context,
both) and fits `pace.StepTime` to four fifths of them; the rest says how well it predicts. `play` gives the
engine a trace's requests at their times, with random tokens; idle time is skipped, not slept.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from modicum.budget.machine import cpu_name
from modicum.core.errors import ModicumError, UserError, unknown
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.pace import Load, StepTime, errors, fit
from modicum.serve.request import Request, SamplingParams
from modicum.serve.schedulers import Plan, Scheduler, State
from modicum.serve.simulate import SLO, Doomed, Played
from modicum.serve.traces import Trace

HELD_OUT = 0.2
PASSES = 3  # each composition is timed so often
TIMERS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: for one thread on a machine with other work
Works = list[tuple[int, int]]  # (cached tokens, tokens to compute) of each sequence


class _Scripted(Scheduler):
    """Gives `next_plan`."""

    next_plan = Plan()

    def plan(self, state: State) -> Plan:
        return self.next_plan


def compositions(count: int, config: EngineConfig, longest: int, capacity: int, seed: int = 0) -> list[Works]:
    """Random steps: decodes alone, pieces alone, both; sizes spread over orders of magnitude."""
    rng = random.Random(seed)
    longest -= 2  # so that no sequence ends with the token that the step samples

    def between(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))

    result = []
    for i in range(count):
        works: Works = []
        kind = i % 4  # decodes, pieces, and both twice
        tokens, free = config.max_batch_tokens, capacity
        if kind != 0:
            most = between(2, tokens)
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                n = min(between(2, most), longest - 2, tokens)
                start = 0 if rng.random() < 0.5 else between(1, longest - n - 1)
                if n < 2 or start + n + 2 * config.block_size > free:
                    break
                works.append((start, n))
                tokens, free = tokens - n, free - start - n - 2 * config.block_size
        if kind != 1:
            typical = between(1, longest - 2)
            for _ in range(between(1, config.max_sequences - len(works))):
                start = min(longest - 2, max(1, round(typical * math.exp(rng.gauss(0, 0.5)))))
                if tokens < 1 or start + 2 * config.block_size > free:
                    break
                works.append((start, 1))
                tokens, free = tokens - 1, free - start - 2 * config.block_size
        if works:
            result.append(works)
    return result


def timer(name: str) -> Callable[[], float]:
    """A clock for steps. Raises `UserError` for CPU time where it is not the time that a step takes."""
    if name not in TIMERS:
        raise unknown("timer", name, TIMERS)
    if name == "cpu" and torch.get_num_threads() != 1:
        raise UserError(
            f"CPU time would count {torch.get_num_threads()} threads together; set OMP_NUM_THREADS=1, or time by wall"
        )
    return TIMERS[name]


def time_step(engine: Engine, works: Works, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a step that computes `n` tokens behind `start` for each of `works`.

    What is cached is not computed before: its place is taken, and holds whatever is there.
    """
    scheduler = engine.scheduler
    assert isinstance(scheduler, _Scripted)
    vocab = engine.model.config.vocab_size
    requests = [
        Request([(7 * i + j) % vocab for j in range(start + n)], SamplingParams(temperature=0, ignore_eos=True))
        for i, (start, n) in enumerate(works)
    ]
    try:
        for request, (start, _n) in zip(requests, works, strict=True):
            engine.add(request)
            sample = request.sequences[0]
            engine.cache.load(sample)
            scheduler.commit(Plan(((sample.id, 1),)))
            if start and not engine.cache.has_room(sample, start):
                raise ModicumError(f"a step of {works} does not fit the cache")
            scheduler.advance(sample.id, start, 0)
        scheduler.next_plan = Plan(tuple((r.sequences[0].id, n) for r, (_, n) in zip(requests, works, strict=True)))
        began = clock()
        updates = engine.step()
        seconds = clock() - began
        fault = next((u.error for u in updates if u.error), None)
        if fault or len(updates) != len(requests):
            raise ModicumError(f"a step could not be timed: {fault or 'not all of it was computed'}")
        return seconds
    finally:
        scheduler.next_plan = Plan()
        for request in requests:
            engine.abort(request.id)


def calibrate(
    model: Decoder,
    config: EngineConfig,
    *,
    steps: int = 240,
    seed: int = 0,
    by: str = "wall",
    progress: Callable[[int], None] | None = None,
) -> StepTime:
    """Step times of this model on this machine, with the errors on held-out steps in `about`."""
    if steps < 50:
        raise UserError(f"{steps} steps are too few to calibrate on; time at least 50")
    engine, clock = Engine(model, None, config), timer(by)
    if engine.policy.drops or engine.watches:
        raise UserError(f"kv={config.kv}: the simulator knows whole caches only; choose kv=full")
    engine.scheduler = _Scripted(
        None, config.block_size, engine.blocks.n_blocks, config.max_batch_tokens, config.max_sequences
    )
    rng, every = random.Random(seed), engine.blocks.take(engine.blocks.n_blocks)
    engine.storage.wipe(every)  # memory that was never written would be read faster
    for block in rng.sample(every, len(every)):  # as they lie after a while of service
        engine.blocks.release([block])
    drawn = compositions(steps, config, engine.max_length, engine.cache.capacity, seed)
    for works in drawn[: max(4, steps // 20)]:  # the first calls of each shape are slow
        time_step(engine, works, clock)
    loads, taken = [Load.of(works) for works in drawn], np.zeros((len(drawn), PASSES))
    for i in range(PASSES):  # not one step several times: it would find its keys in the processor's cache
        for j in rng.sample(range(len(drawn)), len(drawn)):
            taken[j, i] = time_step(engine, drawn[j], clock)
            if progress is not None:
                progress(1)
    order = rng.sample(range(len(loads)), len(loads))
    cut = round(len(order) * HELD_OUT)
    heldout, used = order[:cut], order[cut:]
    fitted = fit([loads[j] for j in used for _ in range(PASSES)], taken[used].ravel())
    wrong = errors(fitted, [loads[j] for j in heldout], np.median(taken[heldout], axis=1))
    shape = model.config
    about: dict[str, Any] = {
        "model": f"{shape.layers} layers of {shape.width}, {shape.heads}/{shape.kv_heads} heads",
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": cpu_name() if model.device.type == "cpu" else str(model.device),
        "timer": by,
        "steps": len(used),
        "held_out": len(heldout),
        "error_median": float(np.median(wrong)),
        "error_p90": float(np.quantile(wrong, 0.9)),
        "error_max": float(wrong.max()),
        "max_length": engine.max_length,
        "max_batch_tokens": config.max_batch_tokens,
        "max_sequences": config.max_sequences,
        "block_size": config.block_size,
        "bytes_per_token": engine.storage.block_bytes // config.block_size,
    }
    engine.close()
    return StepTime(fitted.coefficients, fitted.spread, about)


def play(engine: Engine, trace: Trace, seed: int = 0, slo: SLO | None = None, by: str = "wall") -> Played | None:
    """Give the engine the trace's requests. Its steps take the time they take; waiting for arrivals takes none.

    None as soon as it is clear that `slo` is not met. Raises `ModicumError` if a request fails.
    """
    if trace.arrival_N is None:
        raise UserError(f"{trace.name} has no arrival times; give a rate and draw them: --rate 1 --poisson")
    rng = np.random.default_rng(seed)
    played = Played(trace)
    number: dict[int, int] = {}  # of a request, by its id in the engine
    waiting: set[int] = set()
    before = dict(engine.counters)
    doomed = Doomed(trace, slo) if slo else None
    clock, come, now, shown = 0.0, 0, timer(by), engine.clock
    began = now()
    engine.clock = lambda: clock + now() - began  # what the scheduler and the requests see
    while come < len(trace) or engine.busy:
        if not engine.busy:
            clock = max(clock, float(trace.arrival_N[come]))
        while come < len(trace) and trace.arrival_N[come] <= clock:
            prompt = rng.integers(1, engine.model.config.vocab_size, trace.prompt_N[come]).tolist()
            params = SamplingParams(temperature=0, max_tokens=int(trace.output_N[come]), ignore_eos=True)
            request = Request(prompt, params, arrival=float(trace.arrival_N[come]))
            number[engine.add(request)] = come
            waiting.add(request.id)
            come += 1
        began, computed = now(), engine.counters["computed_tokens"]
        updates = engine.step()
        seconds = now() - began
        for id in [i for i in waiting if i not in engine.requests or engine.requests[i].sequences[0].slot >= 0]:
            played.started[number[id]] = clock
            waiting.remove(id)
            if doomed is not None:
                doomed.start(clock - float(trace.arrival_N[number[id]]))
        began, clock = now(), clock + seconds
        played.busy += seconds
        played.computed += engine.counters["computed_tokens"] - computed
        played.peak_blocks = max(played.peak_blocks, engine.blocks.n_blocks - engine.blocks.free)
        for update in updates:
            if update.error:
                raise ModicumError(f"the engine failed: {update.error}")
            times = played.times[number[update.request]]
            if doomed is not None and times:
                doomed.gap(clock - times[-1])
            times.extend([clock] * len(update.tokens))
        if doomed:
            engine.close()
            engine.clock = shown
            return None
    engine.clock = shown
    played.seconds = clock
    played.steps = engine.counters["steps"] - before["steps"]
    played.preemptions = engine.counters["preemptions"] - before["preemptions"]
    return played
