"""drafter: tokens that a forward pass gives, and seconds per token, one sequence at a time.

Prompts are chunks of held-out text, answers are generated greedily and at a temperature, with drafts in every step;
the axes' figures are the greedy ones. Greedy text of a small model repeats itself, which flatters drafts; sampled
text does so less; and with `forced` the continuation of the held-out text itself is said, which no model's habits
touch. `same` is the share of answers that equal those without drafts. `seconds_pays` lets the engine leave drafts out
while they do not pay. With `body_width` and `body_layers` the same model speaks at the price of one of that size
(`bench.body`): a model that fits the processor's caches pays for a guess nearly what a token costs.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

from modicum.bench import training
from modicum.bench.body import in_body
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports.kv import chunks
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams

AXES = Axes(quality=Axis("tokens_per_forward", "higher"), cost=Axis("seconds_per_token", "lower", "s"))
MODEL = "smollm2"
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    sequence_length: int = 256
    batch_sequences: int = 4
    prompt: int = 128
    answer: int = 64
    sequences: int = 3
    temperature: float = 0.8
    body_width: int = 0  # 0: the model as it is
    body_layers: int = 24


QUICK = Scale(
    **{**training.QUICK, "sequence_length": 96, "tokens": 8 * 96},
    prompt=48,
    answer=16,
    sequences=2,
)


@dataclass(frozen=True)
class Play:
    """What came of some prompts: answers, tokens and forward passes after the first token, their seconds."""

    answers: list[list[int]]
    tokens: int
    forwards: int
    seconds: float
    state_bytes: int

    @property
    def per_forward(self) -> float:
        return self.tokens / max(1, self.forwards)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    bench, model = _pretrained(settings)
    rows = tuple(tuple(row) for row in chunks(bench, settings.scale, seed))
    greedy = play(model, rows, scale, choice, seed, 0.0)
    sampled = play(model, rows, scale, choice, seed, scale.temperature)
    forced = play(model, rows, scale, choice, seed, 0.0, forced=True)
    pays = play(model, rows, scale, choice, seed, 0.0, when="pays")
    pays_sampled = play(model, rows, scale, choice, seed, scale.temperature, when="pays")
    truth, truth_sampled = _plain(scale, settings.data, settings.model, settings.device, seed)
    same = sum(a == b for a, b in zip(greedy.answers, truth, strict=True)) / len(truth)
    same_sampled = sum(a == b for a, b in zip(sampled.answers, truth_sampled, strict=True)) / len(truth)
    metrics = {
        "tokens_per_forward": greedy.per_forward,
        "seconds_per_token": greedy.seconds / greedy.tokens,
        "tokens_per_forward_sampled": sampled.per_forward,
        "seconds_per_token_sampled": sampled.seconds / sampled.tokens,
        "tokens_per_forward_forced": forced.per_forward,
        "seconds_per_token_pays": pays.seconds / pays.tokens,
        "seconds_per_token_sampled_pays": pays_sampled.seconds / pays_sampled.tokens,
        "same": same,
        "same_sampled": same_sampled,
        "state_bytes": float(greedy.state_bytes),
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=greedy.seconds, tokens=greedy.tokens),
        data=bench.corpus.record,
        model=bench.model_record(model, "small decoder, trained"),
    )


def _pretrained(settings: Settings) -> tuple[training.Bench, Decoder]:
    bench, model = training.pretrained(settings, 0, "bfloat16")
    scale: Scale = settings.scale
    return bench, _embodied(model, scale.body_width, scale.body_layers) if scale.body_width else model


@functools.lru_cache(maxsize=1)
def _embodied(model: Decoder, width: int, layers: int) -> Decoder:
    return in_body(model, width, layers)


@functools.lru_cache(maxsize=8)
def _plain(
    scale: Scale, data: str | None, model_name: str | None, device: str, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Answers without drafts, greedy and sampled."""
    settings = Settings(scale=scale, data=data, model=model_name, device=device)
    bench, model = _pretrained(settings)
    rows = tuple(tuple(row) for row in chunks(bench, settings.scale, seed))
    baseline = Choice("drafter", registry.port("drafter").baseline)
    plays = [play(model, rows, scale, baseline, seed, t) for t in (0.0, scale.temperature)]
    return plays[0].answers, plays[1].answers


def play(
    model: Decoder,
    rows: tuple[tuple[int, ...], ...],
    scale: Scale,
    choice: Choice,
    seed: int,
    temperature: float,
    forced: bool = False,
    when: str = "always",
) -> Play:
    """Each prompt by itself, in one engine: what its drafter learns goes on to the next."""
    engine = Engine(
        model,
        None,
        EngineConfig(
            cache=f"{4 * (scale.prompt + scale.answer)}tok",
            max_sequences=1,
            prefix_cache=False,
            drafter=choice,
            draft_when=when,
            max_length=scale.prompt + scale.answer + 1,
        ),
    )
    answers, seconds = [], 0.0
    for i, row in enumerate(rows):
        params = SamplingParams(temperature=temperature, seed=1000 * seed + i, max_tokens=scale.answer, ignore_eos=True)
        given = (list(row[scale.prompt :]),) if forced else ()
        request = Request(list(row[: scale.prompt]), params, given, token_by_token=True)
        engine.add(request)
        engine.step()  # the prompt and the first token
        start = time.perf_counter()
        while engine.requests:
            engine.step()
        seconds += time.perf_counter() - start
        answers.append(request.sequences[0].tokens[scale.prompt :])
    tokens = sum(len(answer) for answer in answers) - len(answers)
    forwards = tokens - engine.counters["accepted_tokens"]
    state = engine.drafting.drafter.nbytes() if engine.drafting else 0
    return Play(answers, tokens, forwards, seconds, state)
