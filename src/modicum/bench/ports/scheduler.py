"""scheduler: latency and throughput of the real engine on one trace of arrivals.

Requests arrive at random (exponential gaps), at about `load` times what the machine can do, measured
beforehand with the baseline; prompts are pieces of held-out text with log-normal lengths, answers have
log-normal lengths too and are generated greedily. The same trace for every method at one seed. Goodput is the
share of requests whose first token came within `ttft_limit` and whose others came at `tpot_limit` on average.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import numpy as np

from modicum.bench import training
from modicum.bench.harness import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams

AXES = Axes(quality=Axis("ttft_p90", "lower", "s"), cost=Axis("tokens_per_second", "higher", "1/s"))


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    sequence_length: int = 512
    batch_sequences: int = 2
    requests: int = 60
    prompt: int = 96  # median tokens
    answer: int = 24
    load: float = 0.8  # of what the engine does when everything waits
    ttft_limit: float = 0.5  # seconds
    tpot_limit: float = 0.1
    cache: str = "6ktok"
    batch_tokens: int = 512


QUICK = Scale(
    **{**training.QUICK, "sequence_length": 128, "tokens": 4 * 128},
    requests=6,
    prompt=20,
    answer=5,
    cache="1ktok",
)


@dataclass(frozen=True)
class Job:
    """A request of the trace: seconds after the start, prompt tokens, answer length."""

    at: float
    prompt: tuple[int, ...]
    answer: int


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    bench, model = training.pretrained(settings, 0)
    jobs = trace(scale, settings.data, settings.model, settings.device, seed)
    seconds, firsts, gaps, engine = play(model, jobs, scale, choice)
    good = np.mean(
        [f <= scale.ttft_limit and g <= scale.tpot_limit for f, g in zip(firsts, gaps, strict=True)]
    )
    generated = engine.counters["generated_tokens"]
    metrics = {
        "ttft_p90": float(np.quantile(firsts, 0.9)),
        "tokens_per_second": generated / seconds,
        "ttft_p50": float(np.quantile(firsts, 0.5)),
        "ttft_p99": float(np.quantile(firsts, 0.99)),
        "tpot_p50": float(np.quantile(gaps, 0.5)),
        "tpot_p99": float(np.quantile(gaps, 0.99)),
        "goodput": float(good),
        "preemptions": engine.counters["preemptions"],
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=seconds, tokens=generated),
        data=bench.corpus.record,
        model=bench.model_record(model, "small decoder, trained"),
    )


@functools.lru_cache(maxsize=8)
def trace(scale: Scale, data: str | None, model_name: str | None, device: str, seed: int) -> tuple[Job, ...]:
    """The seed's requests, with arrivals that keep the baseline busy for `load` of the time."""
    bench, model = training.pretrained(Settings(scale=scale, data=data, model=model_name, device=device), 0)
    rng = np.random.default_rng(seed)
    text = [t for d in bench.corpus.heldout for t in bench.tokenizer.encode(d.text, specials=False)]
    most = min(scale.sequence_length, model.config.context_length) - 1
    jobs = []
    for _ in range(scale.requests):
        answer = int(np.clip(rng.lognormal(np.log(scale.answer), 0.7), 2, most // 2))
        length = int(np.clip(rng.lognormal(np.log(scale.prompt), 0.7), 2, most - answer))
        start = int(rng.integers(max(1, len(text) - length)))
        jobs.append(Job(0.0, tuple(text[start : start + length]), answer))
    play(model, jobs[: len(jobs) // 2], scale, registry.port("scheduler").baseline)  # warm-up
    busy = play(model, jobs, scale, registry.port("scheduler").baseline)[0]
    gaps = rng.exponential(size=len(jobs))
    arrivals = np.cumsum(gaps) / gaps.sum() * busy / scale.load
    return tuple(Job(float(at), job.prompt, job.answer) for at, job in zip(arrivals, jobs, strict=True))


def play(
    model: Decoder, jobs: list[Job] | tuple[Job, ...], scale: Scale, scheduler: Choice | str
) -> tuple[float, list[float], list[float], Engine]:
    """Run the trace in real time: (seconds, seconds to the first token, seconds per later token, engine)."""
    engine = Engine(
        model,
        None,
        EngineConfig(
            cache=scale.cache,
            max_batch_tokens=scale.batch_tokens,
            max_length=scale.sequence_length,
            scheduler=scheduler,
            prefix_cache=False,
        ),
    )
    todo, requests = list(jobs), []
    start = time.monotonic()
    while todo or engine.requests:
        now = time.monotonic() - start
        while todo and todo[0].at <= now:
            job = todo.pop(0)
            params = SamplingParams(temperature=0, max_tokens=job.answer, ignore_eos=True)
            request = Request(list(job.prompt), params, arrival=start + job.at)
            requests.append(request)
            engine.add(request)
        if engine.requests:
            engine.step()
        elif todo:
            time.sleep(max(0.0, start + todo[0].at - time.monotonic()))
    seconds = time.monotonic() - start
    firsts, gaps = [], []
    for request in requests:
        sample = request.sequences[0]
        assert sample.first_token is not None and sample.last_token is not None
        firsts.append(sample.first_token - request.arrival)
        later = len(sample.tokens) - len(request.prompt) - 1
        gaps.append((sample.last_token - sample.first_token) / later if later > 0 else 0.0)
    return seconds, firsts, gaps, engine
