"""residency: predictions and speed of a model that is not all in memory, against the bytes of weights that are.

A decoder of ReLU neurons (MLP eight times as wide as the stream) is trained here, the same for every method, and
written to a folder by each; training text fits what is fitted. Held-out text is then forced token by token through the
engine. Judged by bits per token; beside it `tokens_per_second` of decoding, `read_bytes_per_token`, `reads_per_token`
from disk, and `active`, the part of neurons that are not zero. Read pages are dropped from the system's cache.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.files import write_json
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams
from modicum.serve.residency import NOTE, Residency, load_prepared, note
from modicum.serve.residency.llm_in_a_flash import seen

AXES = Axes(quality=Axis("bits_per_token"), cost=Axis("resident_bytes", "lower", "bytes"))
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 200_000
    width: int = 128
    expansion: int = 8  # MLP width over the stream's
    rows: int = 4  # of held-out text


QUICK = Scale(**training.QUICK, rows=2)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    bench, trained = _trained(scale, settings.data, settings.device, seed)
    T = scale.sequence_length
    ids = [t for d in bench.corpus.train[:400] for t in bench.tokenizer.encode(d.text, specials=False)][: 32 * T]
    tokens_NT = torch.tensor(ids[: len(ids) // T * T]).view(-1, T)
    text = [t for d in bench.corpus.heldout for t in bench.tokenizer.encode(d.text, specials=False)]
    starts = torch.randint(len(text) - T, (scale.rows,), generator=fixtures.seeded(seed)).tolist()
    rows = [text[start : start + T] for start in starts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made: Residency = registry.build("residency", choice)
        made.prepare(copy.deepcopy(trained), folder, tokens_NT)
        write_json(folder / NOTE, note(choice))
        method, model = load_prepared(folder)
        engine = Engine(model, None, EngineConfig(cache=f"{2 * T}tok", max_sequences=1, prefix_cache=False))
        params = SamplingParams(temperature=0, logprobs=1)
        requests = [Request(row[:4], params, (row[4:],), token_by_token=True) for row in rows]
        before, start_time = method.stats(model), time.perf_counter()
        scores = [t.logprob for output in engine.outputs(requests, ahead=1) for t in output.completions[0].logprobs]
        seconds, after = time.perf_counter() - start_time, method.stats(model)
    active = [float(a.float().mean()) for _, a in seen(trained, tokens_NT[:4])]
    metrics = {
        "bits_per_token": -sum(scores) / len(scores) / math.log(2),
        "resident_bytes": after["resident_bytes"],
        "tokens_per_second": len(scores) / seconds,
        "read_bytes_per_token": (after["read_bytes"] - before["read_bytes"]) / len(scores),
        "reads_per_token": (after["reads"] - before["reads"]) / len(scores),
        "active": sum(active) / len(active),
    }
    record = bench.model_record(trained, "small decoder of ReLU neurons, trained")
    cost = Cost(seconds=seconds, tokens=len(scores))
    return Measurement(metrics=metrics, cost=cost, data=bench.corpus.record, model=record)


@functools.lru_cache(maxsize=3)
def _trained(scale: Scale, data: str | None, device: str, seed: int) -> tuple[training.Bench, Decoder]:
    bench = training.Bench.of(Settings(scale=scale, data=data, device=device))
    shape = llama_like(
        bench.tokenizer.vocab_size,
        scale.width,
        scale.layers,
        mlp_width=scale.expansion * scale.width,
        context_length=scale.sequence_length,
        activation="relu",
        gated=False,
    )
    model = Decoder(shape, fixtures.seeded(seed)).to(device)
    bench.train(model, seed)
    return bench, model
