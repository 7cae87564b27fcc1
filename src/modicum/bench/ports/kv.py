"""kv: how well a decoder works from the cache a policy keeps, against the bytes it really holds.

Held-out text is cut into prompts and continuations. The engine computes each prompt, the
policy keeps what it keeps, and the continuation is then forced token by token: its bits per token, and how
often the most likely token is that of the full cache. Bytes are those of the cache taken before the last
token, the mean over pieces, and at most.

With `questions` the playground's needle, multikey and copy are asked as well and judge the policy: share of
right answers, and the bytes held while answering. That says something of a model that can recall:

    modicum run playground-recall
    modicum bench kv --model runs/playground-recall/stages/pretrain/model --scale questions=100

With `stream` a policy that bounds its cache also reads a text of so many times `sequence_length` on end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.evaluate.recall import list_and_copy
from modicum.model.decoder import Decoder
from modicum.serve.backends import Runner
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.plan import AttentionPlan
from modicum.serve.request import Request, SamplingParams

PROBE_SEED = "kv/probe"
AXES = Axes(quality=Axis("bits_per_token"), cost=Axis("held_bytes", "lower", "bytes"))
MODEL = "smollm2"
TIER = "laptop"
RECALL = Axes(quality=Axis("needle", "higher"), cost=Axis("held_bytes", "lower", "bytes"))


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    sequence_length: int = 512
    batch_sequences: int = 2
    prompt: int = 384
    answer: int = 64
    sequences: int = 4
    block_size: int = 16
    questions: int = 0  # of each of the playground's tasks; 0: not asked
    words: int = 760  # of the text in which a needle or the keys lie: about 980 tokens
    keys: int = 8
    copied: int = 64  # words to copy
    stream: int = 0  # times `sequence_length` that an unbounded policy reads; 0: not


QUICK = Scale(
    **{**training.QUICK, "sequence_length": 96, "tokens": 8 * 96},
    prompt=64,
    answer=8,
    sequences=2,
    block_size=4,
)


class Watched(Engine):
    """An engine that notes what its cache holds before each token."""

    def __init__(self, model: Decoder, config: EngineConfig):
        super().__init__(model, None, config)
        self.cache_bytes: list[int] = []  # bytes before each token
        runner = self.runner

        class Noting(Runner):
            def __call__(noting, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
                self.cache_bytes += [self.cache.held_bytes] * len(rows)
                return super().__call__(plan, rows)

        self.runner = Noting(*runner.backends)


@dataclass
class Followed:
    """Of given answers, token by token: surprise in nats, the most likely token in its place, bytes held before it."""

    nats: list[float]
    best: list[int]
    cache_bytes: list[int]


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    bench, model = training.pretrained(settings, seed, "bfloat16")
    start = time.perf_counter()
    followed = play(model, chunks(bench, scale, seed), scale, choice)
    seconds = time.perf_counter() - start
    truth = _full(scale, settings.data, settings.model, settings.device, seed)
    after = [size for i, size in enumerate(followed.cache_bytes) if i % scale.answer == scale.answer - 1]
    metrics = {
        "bits_per_token": sum(followed.nats) / len(followed.nats) / math.log(2),
        "held_bytes": sum(after) / len(after),
        "peak_held_bytes": max(followed.cache_bytes),
        "agreement": sum(a == b for a, b in zip(followed.best, truth, strict=True)) / len(truth),
    }
    if scale.questions:
        metrics = {("text_" if "held" in name else "") + name: value for name, value in metrics.items()}
        metrics |= recall(model, bench, scale, choice, seed)
    if scale.stream:
        metrics |= stream(model, bench, scale, choice, seed)
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=seconds, tokens=len(followed.nats)),
        data=bench.corpus.record,
        model=bench.model_record(model, "small decoder, trained"),
        axes=RECALL if scale.questions else None,
    )


def recall(model: Decoder, bench: training.Bench, scale: Scale, choice: Choice, seed: int) -> dict[str, float]:
    """Right answers of each task, and mean bytes held before an answer's last token, task by task and of all."""
    questions = {
        "needle": f"needle:length={scale.words}",
        "multikey": f"multikey:length={scale.words},keys={scale.keys}",
        "copy": f"copy:length={scale.copied}",
    }
    # A model that repeats what it is asked to says nothing of random tokens: heads are measured on a list it copies.
    ((given, copied),) = list_and_copy(Random(PROBE_SEED), model.config.context_length // 2)
    probe = tuple(bench.tokenizer.encode(given + copied, specials=False))
    scores: dict[str, float] = {}
    every: list[int] = []
    for name, task_choice in questions.items():
        task = registry.build("task", task_choice)
        docs = list(task.docs("test", scale.questions, seed))
        requests = [task.requests(doc, ())[0] for doc in docs]
        prompts = [bench.tokenizer.encode(r.prompt, specials=False) for r in requests]
        most = max(r.max_new_tokens for r in requests)
        longest = max(len(p) for p in prompts) + most + 1
        engine = Watched(model, dataclasses.replace(_engine_config(scale, choice, longest), kv_probe=probe))
        last, grades = [], []
        for doc, request, prompt in zip(docs, requests, prompts, strict=True):
            # an answer never needs more tokens than the right one, and no wrong one becomes right by going on
            need = len(bench.tokenizer.encode(f" {doc['answer']}.", specials=False)) + 1
            params = SamplingParams(temperature=0, max_tokens=min(need, request.max_new_tokens), ignore_eos=True)
            text = bench.tokenizer.decode(engine.generate([prompt], params)[0].tokens)
            cut = min((text.index(s) for s in request.stop if s in text), default=len(text))
            grades.append(task.grade(doc, [text[:cut]])["accuracy"])
            last.append(engine.cache_bytes[-1])
        scores |= {name: sum(grades) / len(grades), f"{name}_held_bytes": sum(last) / len(last)}
        every += last
    return scores | {"held_bytes": sum(every) / len(every), "peak_held_bytes": float(max(every))}


def stream(model: Decoder, bench: training.Bench, scale: Scale, choice: Choice, seed: int) -> dict[str, float]:
    """Bits per token of a text read token by token without an end, and the same text in pieces of the usual length.

    Nothing for policies that bound neither cache nor distances.
    """
    cls: Any = registry.load("kv", choice.method).cls
    if not cls.unbounded:
        return {}
    T, length = scale.sequence_length, scale.stream * scale.sequence_length
    text = [t for d in bench.corpus.heldout for t in bench.tokenizer.encode(d.text, specials=False)]
    start = int(torch.randint(len(text), (1,), generator=fixtures.seeded(seed)))
    tokens = (text[start:] + text * (length // len(text) + 1))[:length]
    followed = follow(Watched(model, _engine_config(scale, choice, length + 1)), [tokens], scale.prompt)
    nats, sizes = followed.nats, followed.cache_bytes
    tenth, middle = length // 10 // T * T or T, len(sizes) // 2
    rows_BT = torch.tensor(tokens[-tenth:]).view(-1, T)
    with torch.inference_mode():
        starts = [
            float(torch.nn.functional.cross_entropy(model(row[None])[0, :-1].float(), row[1:])) for row in rows_BT
        ]
    return {
        "stream_tokens": float(length),
        "stream_bits_first": sum(nats[:tenth]) / tenth / math.log(2),
        "stream_bits_last": sum(nats[-tenth:]) / tenth / math.log(2),
        "stream_bits_last_in_pieces": sum(starts) / len(starts) / math.log(2),
        "stream_held_bytes": float(max(sizes)),
        "stream_held_growth": float(max(sizes[middle:]) - max(sizes[:middle])),
    }


def _engine_config(scale: Scale, policy: Choice | str, longest: int, form: Choice | str = "plain") -> EngineConfig:
    """One sequence at a time, with room for a few."""
    return EngineConfig(
        block_size=scale.block_size,
        cache=f"{4 * min(longest, 4 * scale.sequence_length)}tok",
        max_batch_tokens=longest,
        max_sequences=1,
        prefix_cache=False,
        kv=policy,
        cache_form=form,
        max_length=longest,
    )


@functools.lru_cache(maxsize=8)
def _full(scale: Scale, data: str | None, model_name: str | None, device: str, seed: int) -> tuple[int, ...]:
    """What the full cache finds most likely at every place."""
    settings = Settings(scale=scale, data=data, model=model_name, device=device)
    bench, model = training.pretrained(settings, seed, "bfloat16")
    return tuple(play(model, chunks(bench, scale, seed), scale, registry.port("kv").baseline).best)


def chunks(bench: training.Bench, scale: Scale, seed: int) -> list[list[int]]:
    """Held-out text in pieces of prompt + answer tokens; the seed picks where they begin."""
    text = [t for d in bench.corpus.heldout for t in bench.tokenizer.encode(d.text, specials=False)]
    length = scale.prompt + scale.answer
    if len(text) < length:
        raise UserError(
            f"the held-out side has {len(text)} tokens, less than one piece of {length}; give "
            "--scale heldout_bytes=... or a shorter prompt"
        )
    starts = torch.randint(len(text) - length + 1, (scale.sequences,), generator=fixtures.seeded(seed)).tolist()
    return [text[start : start + length] for start in starts]


def play(
    model: Decoder, rows: list[list[int]], scale: Scale, policy: Choice | str, form: Choice | str = "plain"
) -> Followed:
    """Each piece by itself through an engine, its answer given."""
    config = _engine_config(scale, policy, scale.prompt + scale.answer + 1, form)
    return follow(Watched(model, config), rows, scale.prompt)


def follow(engine: Watched, rows: list[list[int]], prompt: int) -> Followed:
    """What `engine` makes of each row's tokens after the first `prompt`, one row after the other."""
    params = SamplingParams(temperature=0, logprobs=1)
    requests = [Request(row[:prompt], params, (row[prompt:],), token_by_token=True) for row in rows]
    scores = [t for output in engine.outputs(requests, ahead=1) for t in output.completions[0].logprobs]
    return Followed([-t.logprob for t in scores], [t.top[0][0] for t in scores], engine.cache_bytes)
