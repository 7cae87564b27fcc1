"""guide: what a large model gains on a domain that only a small one was fine-tuned on, against the seconds of decoding.

Two decoders, small and large, are pretrained on all domains but one, and both are fine-tuned on that one. Served is the
large one before fine-tuning, beside it the small one after and before (knobs `tuned`, `base`). Judged by bits per token
of held-out text of the new domain, through the engine; beside it those of the small model fine-tuned (`tuned_bits`), of
the large one fine-tuned (`gold_bits`, what training it would have given) and of text of the old domains
(`old_bits_per_token`). A guide should lie between the fine-tuned small model and the fine-tuned large one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modicum.bench import fixtures, training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.decoder import Decoder
from modicum.model.folder import save_model
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams

AXES = Axes(quality=Axis("bits_per_token"), cost=Axis("decode_seconds", "lower", "s"))
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    tokens: int = 80_000  # of fine-tuning
    base_tokens: int = 250_000
    target_bytes: int = 80_000  # of the new domain
    large_width: int = 128
    large_layers: int = 5
    large_rate: float = 3e-3
    target: str = "howto"  # the new domain, where the corpus has it; else the last by name
    rows: int = 24  # of held-out text that are scored, half of the context each the prompt


QUICK = Scale(**training.QUICK, base_tokens=1024, target_bytes=20_000, large_width=64, large_layers=2, rows=2)


@dataclass(frozen=True)
class Models:
    bench: training.Bench
    small: tuple[Decoder, Decoder]  # before and after
    large: tuple[Decoder, Decoder]
    new: list[list[int]]  # rows of held-out text
    old: list[list[int]]
    folders: tuple[str, str]  # of the small models


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    models = _models(settings.scale, settings.data, settings.device, seed)
    names = registry.load("guide", choice.method).cls.folders
    given = {"base": models.folders[0], "tuned": models.folders[1]}
    picked = Choice("guide", choice.method, {k: given[k] for k in names if k in given} | choice.knobs)
    start = time.perf_counter()
    bits = _bits(models.large[0], models.new, picked)
    seconds = time.perf_counter() - start
    metrics = {
        "bits_per_token": bits,
        "old_bits_per_token": _bits(models.large[0], models.old, picked),
        "base_bits": _bits(models.large[0], models.new),
        "tuned_bits": _bits(models.small[1], models.new),
        "gold_bits": _bits(models.large[1], models.new),
        "decode_seconds": seconds,
    }
    scored = sum(len(row) - len(row) // 2 for row in models.new)
    cost = Cost(seconds=seconds, tokens=scored)
    record = models.bench.model_record(models.large[0], "small decoder, trained")
    return Measurement(metrics=metrics, cost=cost, data=models.bench.corpus.record, model=record)


def _bits(model: Decoder, rows: list[list[int]], guide: Choice | str = "none") -> float:
    """Bits per token of the later half of each row, token by token through the engine."""
    config = EngineConfig(cache=f"{4 * len(rows[0]) + 64}tok", max_sequences=4, prefix_cache=False, guide=guide)
    engine = Engine(model, None, config)
    params = SamplingParams(temperature=0, logprobs=1)
    requests = [Request(row[: len(row) // 2], params, (row[len(row) // 2 :],), token_by_token=True) for row in rows]
    scores = [t.logprob for output in engine.outputs(requests, ahead=4) for t in output.completions[0].logprobs]
    return -sum(scores) / len(scores) / math.log(2)


@functools.lru_cache(maxsize=2)
def _models(scale: Scale, data: str | None, device: str, seed: int) -> Models:
    wide = dataclasses.replace(scale, width=scale.large_width, layers=scale.large_layers, rate=scale.large_rate)
    pairs = []
    for one in (scale, wide):
        bench = training.Bench.of(Settings(scale=one, data=data, device=device))
        domains = sorted(d for d in bench.corpus.domains if bench.corpus.heldout_texts(d))
        name = scale.target if scale.target in domains else domains[-1]
        old = [d for d in bench.corpus.train if d.domain != name] or bench.corpus.train
        base = bench.model(seed)
        bench.train(base, seed, bench.stream(seed, old, tokens=one.base_tokens), tokens=one.base_tokens)
        tuned, size, new = copy.deepcopy(base), 0, []
        for document in (d for d in bench.corpus.train if d.domain == name):
            new.append(document)
            size += len(document.text.encode())
            if size >= scale.target_bytes:
                break
        bench.train(tuned, seed, bench.stream(seed, new, tokens=one.tokens), tokens=one.tokens, rate=one.rate / 2)
        pairs.append((base, tuned))
    bench = training.Bench.of(Settings(scale=scale, data=data, device=device))
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    folders = []
    for kind, model in zip(("base", "tuned"), pairs[0], strict=True):
        folders.append(str(Path(folder.name) / kind))
        save_model(model, folders[-1])
    old_texts = [t for d in domains if d != name for t in bench.corpus.heldout_texts(d)]
    rows = [_rows(bench, texts, scale, seed) for texts in (bench.corpus.heldout_texts(name), old_texts)]
    return Models(bench, pairs[0], pairs[1], rows[0], rows[1] or rows[0], (folders[0], folders[1]))


def _rows(bench: training.Bench, texts: list[str], scale: Scale, seed: int) -> list[list[int]]:
    """Rows of a context's length, where the seed begins."""
    ids = [t for text in texts for t in bench.tokenizer.encode(text, specials=False)]
    T = scale.sequence_length
    if len(ids) < T:
        return []
    starts = torch.randint(len(ids) - T + 1, (scale.rows,), generator=fixtures.seeded(seed)).tolist()
    return [ids[start : start + T] for start in starts]


_KEPT: list[Any] = []  # temporary folders that live as long as the process
