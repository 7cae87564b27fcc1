"""A discrete-event simulator of the engine: a scheduler, blocks, a trace of requests and a model of step times.

The scheduler is the engine's own object and is driven the same way; the blocks are counted by the engine's own
`BlockPool`; a step advances the clock by what `pace.StepTime` says of it. Prefix hits are left out. What comes
out (`Played`) is the same for a simulated run and one of the real engine (`simulate_engine.play`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.serve.blocks import BlockPool
from modicum.serve.pace import Load, StepTime
from modicum.serve.schedulers import Job, Plan, Scheduler
from modicum.serve.traces import Trace

PERCENTILES = (50, 90, 99)
STRICT = 5  # a step with prompts in it may last this many times one of decodes alone


@dataclass(frozen=True, kw_only=True)
class SLO:
    """What a service promises. tbt: seconds between two tokens, for 99 in 100; ttft: to the first, for goodput.

    delay: the median wait before a request's first step, which tells a load that is sustained from a queue
    that only grows (2 s in Sarathi-Serve, arXiv:2403.02310, section 5).
    """

    tbt: float
    ttft: float = 5.0
    delay: float = 2.0
    quantile: float = 0.99

    def __post_init__(self) -> None:
        if min(self.tbt, self.ttft, self.delay) <= 0 or not 0 < self.quantile < 1:
            raise UserError(f"{self}: seconds must be above 0, and the share between 0 and 1")


def strict_tbt(pace: StepTime, trace: Trace, sequences: int) -> float:
    """Seconds between tokens for an `SLO`: five times a step of decodes alone, of up to 32 sequences of the
    trace's mean context (the strict one of Sarathi-Serve, section 5, there with 4096 tokens of context)."""
    context = int(trace.prompt_N.mean() + trace.output_N.mean() / 2)
    return STRICT * pace.seconds(Load.of([(context, 1)] * min(32, sequences)))


def aimed(choice: Any, slo: SLO) -> Choice:
    """A choice of a scheduler; one with a knob `tbt` that is left open is given the promise's."""
    result = Choice.parse("scheduler", choice)
    names = {f.name for f in fields(registry.load("scheduler", result.method).config)}
    if "tbt" not in names or {"tbt", "budget"} & set(result.knobs):
        return result
    return Choice("scheduler", result.method, result.knobs | {"tbt": float(f"{slo.tbt:.4g}")})


@dataclass(eq=False)
class Played:
    """What happened to each request of a trace; times in seconds on the clock of the arrivals."""

    trace: Trace
    started: np.ndarray = field(init=False)  # first step of each request; NaN until then
    times: list[array[float]] = field(init=False)  # of each token of each answer
    seconds: float = 0.0
    busy: float = 0.0  # seconds spent in steps
    steps: int = 0
    computed: int = 0
    preemptions: int = 0
    peak_blocks: int = 0

    def __post_init__(self) -> None:
        self.started = np.full(len(self.trace), math.nan)
        self.times = [array("d") for _ in range(len(self.trace))]

    def gaps(self) -> np.ndarray:
        """Seconds between neighbouring tokens of all answers (TBT)."""
        parts = [np.diff(times) for times in self.times if len(times) > 1]
        return np.concatenate(parts) if parts else np.zeros(1)

    def meets(self, slo: SLO) -> bool:
        """Whether the run kept to the promise: tokens in time, and no growing queue."""
        assert self.trace.arrival_N is not None
        delay = float(np.median(self.started - self.trace.arrival_N))
        return bool(np.mean(self.gaps() > slo.tbt) <= 1 - slo.quantile and delay <= slo.delay)

    def report(self, slo: SLO | None = None) -> dict[str, Any]:
        """Percentiles of TTFT, TPOT (mean gap of a request), TBT (each gap) and waiting; rates; goodput."""
        arrival_N = self.trace.arrival_N
        assert arrival_N is not None
        first_N = np.array([times[0] for times in self.times])
        last_N = np.array([times[-1] for times in self.times])
        later_N = np.array([len(times) - 1 for times in self.times])
        tpot_N = (last_N - first_N) / np.maximum(later_N, 1)
        gaps = self.gaps()
        tokens = int(later_N.sum()) + len(self.times)
        result: dict[str, Any] = {"requests": len(self.times), "rate": self.trace.rate}
        for name, values in (
            ("ttft", first_N - arrival_N),
            ("tpot", tpot_N[later_N > 0] if (later_N > 0).any() else np.zeros(1)),
            ("tbt", gaps),
            ("delay", self.started - arrival_N),
            ("latency", last_N - arrival_N),
        ):
            result |= {f"{name}_p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
        result |= {
            "tbt_max": float(gaps.max()),
            "tokens_per_second": tokens / self.seconds if self.seconds else 0.0,
            "busy": self.busy / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
            "steps": self.steps,
            "tokens_per_step": self.computed / max(1, self.steps),
            "preemptions": self.preemptions,
            "peak_blocks": self.peak_blocks,
        }
        if slo is not None:
            slow_N = np.array([np.mean(np.diff(t) > slo.tbt) if len(t) > 1 else 0.0 for t in self.times])
            good = float(np.mean((first_N - arrival_N <= slo.ttft) & (slow_N <= 1 - slo.quantile)))
            result |= {
                "late_gaps": float(np.mean(gaps > slo.tbt)),
                "good": good,
                "goodput": good * len(self.times) / self.seconds if self.seconds else 0.0,
                "meets": self.meets(slo),
            }
        return result


class Doomed:
    """Notes late tokens and late starts; true as soon as a run cannot keep to its promise any more."""

    def __init__(self, trace: Trace, slo: SLO):
        self.slo = slo
        self.gaps_left = int((1 - slo.quantile) * max(0, int(trace.output_N.sum()) - len(trace)))
        self.starts_left = len(trace) // 2

    def __bool__(self) -> bool:
        return self.gaps_left < 0 or self.starts_left < 0

    def gap(self, seconds: float) -> None:
        self.gaps_left -= seconds > self.slo.tbt

    def start(self, delay: float) -> None:
        self.starts_left -= delay > self.slo.delay


def simulate(trace: Trace, scheduler: Scheduler, pace: StepTime, slo: SLO | None = None) -> Played | None:
    """Play `trace` with step times from `pace`; None as soon as it is clear that `slo` is not met.

    `scheduler` is a fresh one and says how many blocks, tokens and sequences there are. Raises `UserError`
    for a request that no cache of that size can hold, `ModicumError` if the scheduler stands still.
    """
    if trace.arrival_N is None:
        raise UserError(f"{trace.name} has no arrival times; give a rate and draw them: --rate 1 --poisson")
    s, P = scheduler, scheduler.block_size
    longest = int((trace.prompt_N + trace.output_N).max())
    if longest > s.n_blocks * P:
        raise UserError(
            f"a request of {trace.name} has {longest} tokens, the cache holds {s.n_blocks * P}; "
            "give a larger --cache, or a smaller --max-length, which cuts prompts"
        )
    arrival, prompt, output = trace.arrival_N.tolist(), trace.prompt_N.tolist(), trace.output_N.tolist()
    pool, allocated = BlockPool(s.n_blocks), dict[int, list[int]]()
    played = Played(trace)
    doomed = Doomed(trace, slo) if slo else None
    clock, come = 0.0, 0
    while come < len(trace) or s.pending():
        if not s.pending():
            clock = max(clock, arrival[come])
        while come < len(trace) and arrival[come] <= clock:
            s.add(Job(come, arrival[come], prompt[come], prompt[come]))
            come += 1
        works = _apply(s, s.plan(s.state(pool.free, clock)), pool, allocated, played)
        if not works:
            if s.running or come >= len(trace):
                raise ModicumError(f"{s.pending()} requests are there and the scheduler starts none")
            clock = max(clock, arrival[come])  # as an idle engine asks again
            continue
        seconds = pace.seconds(Load.of((job.computed, n) for job, n in works))
        for job, _n in works:
            if math.isnan(played.started[job.id]):
                played.started[job.id] = clock
                if doomed is not None:
                    doomed.start(clock - arrival[job.id])
        clock += seconds
        played.busy += seconds
        played.steps += 1
        played.peak_blocks = max(played.peak_blocks, s.n_blocks - pool.free)
        for job, n in works:
            played.computed += n
            job.computed += n
            if job.computed < job.length:
                continue
            job.length += 1
            times = played.times[job.id]
            if doomed is not None and times:
                doomed.gap(clock - times[-1])
            times.append(clock)
            if len(times) >= output[job.id]:
                s.remove(job.id)
                pool.release(allocated.pop(job.id))
        if doomed:  # a promise is asked for, and is broken by now
            return None
    played.seconds = clock
    return played


def _apply(
    s: Scheduler, plan: Plan, pool: BlockPool, allocated: dict[int, list[int]], played: Played
) -> list[tuple[Job, int]]:
    """Make the plan true as the engine does: preempt, admit, take blocks; the plan's end gives way."""
    for id in plan.preempt:
        pool.release(allocated.pop(id, []))
        played.preemptions += 1
    s.commit(plan)
    run, works = list(plan.run), []
    while run:
        id, n = run.pop(0)
        job, blocks = s.jobs[id], allocated.setdefault(id, [])
        more = -(-(job.computed + n) // s.block_size) - len(blocks)
        while more > pool.free:
            late = run.pop()[0] if run else id
            pool.release(allocated.pop(late, []))
            s.commit(Plan(preempt=(late,)))
            played.preemptions += 1
            if late == id:
                break
        else:
            blocks += pool.take(max(0, more))
            job.own, job.capacity = len(blocks), len(blocks) * s.block_size
            works.append((job, n))
    return works


def capacity(
    trace: Trace,
    make: Callable[[], Scheduler],
    pace: StepTime,
    slo: SLO,
    *,
    start: float = 1.0,
    tolerance: float = 0.02,
    poisson: int | None = None,
) -> tuple[float, Played | None]:
    """The largest rate (requests/s, within `tolerance`) that keeps to `slo`, and the run at that rate.

    (0, None) if even the slowest does not; (inf, the last run) if the trace is over before a queue can form.
    """
    return search(
        lambda rate: simulate(trace.at_rate(rate, poisson), make(), pace, slo), len(trace), slo, start, tolerance
    )


def search(
    run: Callable[[float], Played | None],
    requests: int,
    slo: SLO,
    start: float,
    tolerance: float,
    stride: float = 2.0,
) -> tuple[float, Played | None]:
    """Bracket by factors that start at `stride`, then bisect; `run` gives a run at a rate, or None if doomed."""
    low, best, high = 0.0, None, math.inf
    rate = start
    while high / max(low, 1e-300) > 1 + tolerance:
        played = run(rate)
        if played is not None and played.meets(slo):
            low, best = rate, played
        else:
            high = rate
        if math.isinf(high):
            rate, stride = stride * low, min(2.0, stride * stride)
            if requests / rate < slo.delay / 4:  # all are there before half of them can have waited too long
                return math.inf, best
        elif low == 0.0:
            rate, stride = high / stride, min(2.0, stride * stride)
            if rate < start / 4096:
                return 0.0, None
        else:
            rate = math.sqrt(low * high)
    return low, best
