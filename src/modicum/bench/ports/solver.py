"""solver: accuracy against generated tokens, on sums that a small decoder can do at once, or in worked steps.

A decoder of about a million parameters is trained, on answers only, to reply to sums of `terms` numbers in two modes
that a control word names: fast (the result) and slow (worked steps: column by column for one operation, one
operation after another for several). Solvers are asked fresh sums, with the outline a parser makes. `fast_score` and
`slow_score` are greedy answers of the whole sum in either mode; `above_line` is the accuracy less that of a mixture of
both that spends as many tokens. All solvers of a seed ask the same decoder.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import fingerprint
from modicum.data.tokenizer import SPECIALS, Tokenizer
from modicum.evaluate.answer import Answerer
from modicum.evaluate.solvers import Problem, Solved, Solver, solve
from modicum.evaluate.solving import Engined
from modicum.evaluate.teach import AnswerStream, Document
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

AXES = Axes(quality=Axis("score", "higher"), cost=Axis("tokens", "lower", "tokens"))
LIMITS: set[str] = set()
SLOW, FAST = "w", "d"  # control words: worked, direct


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 1_500_000
    width: int = 128
    layers: int = 2
    sequence_length: int = 96
    batch_sequences: int = 8
    rate: float = 3e-3
    digits: int = 2
    terms: int = 3
    questions: int = 200


QUICK = Scale(**{**training.QUICK, "sequence_length": 192, "tokens": 4 * 4 * 192}, digits=1, terms=3, questions=4)
TIER = "laptop"


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    model, tokenizer = trained(scale, seed, settings.device)
    answerer = Answerer(model, tokenizer, prefix="start", template="none")
    ask = Engined(answerer, slow=SLOW, fast=FAST)
    rng = Random(f"solver bench/{seed}")
    sums = [drawn(rng, scale) for _ in range(scale.questions)]
    problems = [problem(terms, scale) for terms in sums]
    wanted = [str(sum(terms)) for terms in sums]

    def spent(solver: Solver) -> tuple[float, float, list[Solved]]:
        results = solve(solver, problems, ask, seed=seed)
        right = [result_of(r.text) == w for r, w in zip(results, wanted, strict=True)]
        return float(np.mean(right)), float(np.mean([r.tokens for r in results])), results

    start = time.perf_counter()
    score, tokens, results = spent(registry.build("solver", choice))
    seconds = time.perf_counter() - start
    fast, slow = (spent(registry.build("solver", f"greedy:think={think}"))[:2] for think in ("false", "true"))
    metrics = {
        "score": score,
        "tokens": tokens,
        "generations": float(np.mean([r.generations for r in results])),
        "prompt_tokens": float(np.mean([r.prompt_tokens for r in results])),
        "fast_score": fast[0],
        "fast_tokens": fast[1],
        "slow_score": slow[0],
        "slow_tokens": slow[1],
        "above_line": score - line(tokens, fast, slow),
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=seconds),
        model=fixtures.model_record(model, "small decoder, trained on sums in two modes"),
        data={"name": f"sums of {scale.terms} numbers, seed {seed}", "checksum": fingerprint(sums)},
    )


def line(tokens: float, fast: tuple[float, float], slow: tuple[float, float]) -> float:
    """The accuracy of answering a part of the questions slowly and the rest fast, at so many tokens on average."""
    part = np.clip((tokens - fast[1]) / max(slow[1] - fast[1], 1e-9), 0, 1)
    return float(fast[0] + part * (slow[0] - fast[0]))


def drawn(rng: Random, scale: Scale) -> list[int]:
    """Signed terms; the first is positive. Digits are uniform, so that short and long numbers are equally frequent."""
    sizes = [rng.randint(1, scale.digits) for _ in range(scale.terms)]
    numbers = [rng.randint(0 if size == 1 else 10 ** (size - 1), 10**size - 1) for size in sizes]
    return [number if i == 0 or rng.random() < 0.5 else -number for i, number in enumerate(numbers)]


def problem(terms: Sequence[int], scale: Scale) -> Problem:
    steps = [f"{terms[0]}{terms[1]:+d}="] + [f"{{{i}}}{term:+d}=" for i, term in enumerate(terms[2:])]
    most = 16 * scale.terms * (scale.digits + 2)
    return Problem(f"{written(terms)}=", most, (".",), extract=result_of, steps=tuple(steps), layout=layout)


def layout(question: str, steps: Sequence[tuple[str, str]], step: str) -> str:
    return f"{question}{';'.join([*(name + answer for name, answer in steps), step])}"


def written(terms: Sequence[int]) -> str:
    return f"{terms[0]}" + "".join(f"{term:+d}" for term in terms[1:])


def result_of(reply: str) -> str:
    """What stands after the last mark of a worked reply; a direct one is its own result."""
    return reply.rpartition(">")[2].strip(" .")


def columns(a: int, b: int) -> str:
    """One operation worked digit by digit, lowest first: digits of both, carry, digit of the result."""
    size = max(len(str(abs(a))), len(str(abs(b))))
    total, work = a + b, []
    negative = total < 0
    left, right = (-a, -b) if negative else (a, b)
    carry = 0
    for position in range(size):
        x, y = (int(str(abs(v)).zfill(size)[-1 - position]) * (1 if v >= 0 else -1) for v in (left, right))
        digit = (x + y + carry) % 10
        carry = (x + y + carry - digit) // 10
        work.append(f"{x}{y:+d}:{carry}{digit}")
    return f"{'-' if negative else '+'}{','.join(work)}>{total}"


def chain(terms: Sequence[int]) -> str:
    """One operation after another, each with its result."""
    total, work = terms[0], []
    for term in terms[1:]:
        work.append(f"{total}{term:+d}={total + term}")
        total += term
    return f"{','.join(work)}>{total}"


def lesson(rng: Random, scale: Scale) -> Document:
    """A question, whole or one of its steps after the others, in one of the modes."""
    terms = drawn(rng, scale)
    slow = rng.random() < 0.5
    if rng.random() < 0.4:
        prompt = f"{written(terms)}="
        return [(prompt + (SLOW if slow else FAST), (chain(terms) if slow else str(sum(terms))) + ".")]
    at = rng.randrange(1, len(terms))
    partial = [sum(terms[: i + 1]) for i in range(len(terms))]
    names = [f"{partial[i - 1]}{terms[i]:+d}=" for i in range(1, at + 1)]
    earlier = [(name, str(partial[i])) for i, name in enumerate(names[:-1], 1)]
    prompt = layout(f"{written(terms)}=", earlier, names[-1])
    work = columns(partial[at - 1], terms[at]) if slow else str(partial[at])
    return [(prompt + (SLOW if slow else FAST), work + ".")]


@functools.lru_cache(maxsize=3)
def trained(scale: Scale, seed: int, device: str) -> tuple[Decoder, Tokenizer]:
    """The decoder that knows both modes, the same for every solver of a seed."""
    from modicum.core.events import Events
    from modicum.train.config import TrainConfig
    from modicum.train.loop import train

    tokenizer = Tokenizer.train(["0"], 256 + len(SPECIALS))  # bytes: a digit is a token
    shape = llama_like(tokenizer.vocab_size, scale.width, scale.layers, context_length=4 * scale.sequence_length)
    model = Decoder(shape, fixtures.seeded(seed)).to(device)
    config = TrainConfig(
        tokens=scale.tokens,
        sequence_length=scale.sequence_length,
        batch_sequences=scale.batch_sequences,
        lr=scale.rate,
        dtype=scale.dtype,
        seed=seed,
        device=device,
    )
    stream = AnswerStream(lambda rng: lesson(rng, scale), tokenizer, sequence_length=scale.sequence_length, seed=seed)
    train(model, stream, config, None, events=Events(None), label="")
    return model.float().eval(), tokenizer
