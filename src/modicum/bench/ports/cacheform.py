"""cacheform: how well a decoder works from a cache stored in fewer bits, against the bytes it really holds.

As the kv bench: held-out text is cut into prompts and continuations, the engine computes each prompt, and the
continuation is forced token by token from the cache as the form stores it. Bits per token, and how often the most
likely token is that of the plain cache; bytes of the cache that are taken before an answer's last token, with the
tokens that are not coded yet. A form that is fitted is fitted on training text, four times as much as is scored; the
seconds of that are `fit_seconds`, and no part of the others.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import kv
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms._fitted import FittedForm, fit_form, write_fit

AXES = Axes(quality=Axis("bits_per_token"), cost=Axis("held_bytes", "lower", "bytes"))
MODEL = "smollm2"
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(kv.Scale):
    pass


QUICK = Scale(
    **{**training.QUICK, "sequence_length": 96, "tokens": 8 * 96},
    prompt=64,
    answer=8,
    sequences=2,
    block_size=4,
)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    bench, model = training.pretrained(settings, seed)
    fit_seconds, choice = _fitted(choice, bench, model, scale)
    start = time.perf_counter()
    followed = kv.play(model, kv.chunks(bench, scale, seed), scale, "full", choice)
    seconds = time.perf_counter() - start
    truth = _plain(scale, settings.data, settings.model, settings.device, seed)
    after = [size for i, size in enumerate(followed.cache_bytes) if i % scale.answer == scale.answer - 1]
    extra = {"fit_seconds": fit_seconds} if fit_seconds else {}
    return Measurement(
        metrics={
            "bits_per_token": sum(followed.nats) / len(followed.nats) / math.log(2),
            "held_bytes": sum(after) / len(after),
            "agreement": sum(a == b for a, b in zip(followed.best, truth, strict=True)) / len(truth),
        }
        | extra,
        cost=Cost(seconds=seconds, tokens=len(followed.nats)),
        data=bench.corpus.record,
        model=bench.model_record(model, "small decoder, trained"),
    )


def _fitted(choice: Choice, bench: training.Bench, model: Decoder, scale: Scale) -> tuple[float, Choice]:
    """Seconds of fitting, and the choice with its file; a form that is not fitted as it is."""
    if not issubclass(registry.load("cacheform", choice.method).cls, FittedForm):
        return 0.0, choice
    ids = [t for d in bench.corpus.train[:2000] for t in bench.tokenizer.encode(d.text, specials=False)]
    n = min(4 * scale.sequences, len(ids) // scale.prompt)
    start = time.perf_counter()
    fit = fit_form(choice, model, torch.tensor(ids[: n * scale.prompt]).view(n, -1))
    seconds = time.perf_counter() - start
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    path = Path(folder.name) / "fit.safetensors"
    write_fit(path, fit, model.config)
    return seconds, Choice("cacheform", choice.method, choice.knobs | {"fit": str(path)})


_KEPT: list[Any] = []  # temporary folders that live as long as the process


@functools.lru_cache(maxsize=8)
def _plain(scale: Scale, data: str | None, model_name: str | None, device: str, seed: int) -> tuple[int, ...]:
    """What the plain cache finds most likely at every place."""
    bench, model = training.pretrained(Settings(scale=scale, data=data, model=model_name, device=device), seed)
    baseline = registry.port("cacheform").baseline
    return tuple(kv.play(model, kv.chunks(bench, scale, seed), scale, "full", baseline).best)
