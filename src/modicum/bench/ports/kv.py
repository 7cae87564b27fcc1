"""kv: how well a decoder continues text from the cache a policy keeps, against the bytes it really holds.

Held-out text is cut into prompts and continuations. The engine computes each prompt, the
policy keeps what it keeps, and the continuation is then forced token by token: its bits per token, and how
often the most likely token is that of the full cache. Bytes are those of the cache taken before the last
token, the mean over pieces, and at most.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.bench import lab, training
from modicum.bench.harness import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.serve.attend import Work
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, Sample, SamplingParams, Update

AXES = Axes(quality=Axis("bits_per_token"), cost=Axis("held_bytes", "lower", "bytes"))


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    sequence_length: int = 512
    batch_sequences: int = 2
    prompt: int = 384
    answer: int = 64
    sequences: int = 12
    block_size: int = 16


QUICK = Scale(
    **{**training.QUICK, "sequence_length": 96, "tokens": 8 * 96},
    prompt=64,
    answer=8,
    sequences=2,
    block_size=4,
)


class Forced(Engine):
    """An engine that says given answers, and notes what it would have said and how likely the answer was."""

    def __init__(self, model: Decoder, config: EngineConfig):
        super().__init__(model, None, config)
        self.answers: dict[int, list[int]] = {}  # request -> tokens to say
        self.nats: list[float] = []
        self.best: list[int] = []
        self.held: list[int] = []  # bytes before each token

    def _commit(
        self, works: list[Work], samples: list[Sample], logits_BV: Tensor | None, updates: list[Update]
    ) -> None:
        for row, sample in enumerate(samples):
            assert logits_BV is not None
            token = self.answers[sample.request.id][len(sample.tokens) - len(sample.request.prompt)]
            logits_V = logits_BV[row].float()
            self.nats.append(float(torch.logsumexp(logits_V, 0) - logits_V[token]))
            self.best.append(int(logits_V.argmax()))
            self.held.append(self.held_bytes())
            logits_BV[row] = 0.0
            logits_BV[row, token] = 1.0
        super()._commit(works, samples, logits_BV, updates)

    def held_bytes(self) -> int:
        """Bytes of the cache that are taken: whole blocks, less the pages of broken ones that are free."""
        page = self.storage.block_bytes / self.storage.pages_per_block
        return int(
            (self.blocks.n_blocks - self.blocks.free) * self.storage.block_bytes - self.pages.free * page
        )


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    bench, model = training.pretrained(settings, seed)
    start = time.perf_counter()
    engine = play(model, pieces(bench, scale, seed), scale, choice)
    seconds = time.perf_counter() - start
    truth = _full(scale, settings.data, settings.model, settings.device, seed)
    after = [held for i, held in enumerate(engine.held) if i % scale.answer == scale.answer - 1]
    metrics = {
        "bits_per_token": sum(engine.nats) / len(engine.nats) / math.log(2),
        "held_bytes": sum(after) / len(after),
        "peak_held_bytes": max(engine.held),
        "agreement": sum(a == b for a, b in zip(engine.best, truth, strict=True)) / len(truth),
    }
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=seconds, tokens=len(engine.nats)),
        data=bench.corpus.record,
        model=bench.model_record(model, "small decoder, trained"),
    )


@functools.lru_cache(maxsize=8)
def _full(scale: Scale, data: str | None, model_name: str | None, device: str, seed: int) -> tuple[int, ...]:
    """What the full cache finds most likely at every place."""
    settings = Settings(scale=scale, data=data, model=model_name, device=device)
    bench, model = training.pretrained(settings, seed)
    return tuple(play(model, pieces(bench, scale, seed), scale, registry.port("kv").baseline).best)


def pieces(bench: training.Bench, scale: Scale, seed: int) -> list[list[int]]:
    """Held-out text in pieces of prompt + answer tokens; the seed picks where they begin."""
    text = [t for d in bench.corpus.heldout for t in bench.tokenizer.encode(d.text, specials=False)]
    length = scale.prompt + scale.answer
    if len(text) < length:
        raise UserError(
            f"the held-out side has {len(text)} tokens, less than one piece of {length}; give "
            "--scale heldout_bytes=... or a shorter prompt"
        )
    starts = torch.randint(len(text) - length + 1, (scale.sequences,), generator=lab.seeded(seed)).tolist()
    return [text[start : start + length] for start in starts]


def play(model: Decoder, rows: list[list[int]], scale: Scale, policy: Choice | str) -> Forced:
    """Each piece by itself through the engine, its answer forced."""
    engine = Forced(
        model,
        EngineConfig(
            block_size=scale.block_size,
            cache=f"{4 * (scale.prompt + scale.answer)}tok",
            max_batch_tokens=scale.prompt,
            max_sequences=1,
            prefix_cache=False,
            kv=policy,
            max_length=scale.prompt + scale.answer + 1,
        ),
    )
    for row in rows:
        params = SamplingParams(temperature=0, max_tokens=scale.answer, ignore_eos=True)
        request = Request(row[: scale.prompt], params)
        engine.answers[request.id] = row[scale.prompt :]
        engine.add(request)
        while engine.requests:
            engine.step()
    return engine
