"""cacheform: how well a decoder works from a cache stored in fewer bits, against the bytes it really holds.

As the kv bench: held-out text is cut into prompts and continuations, the engine computes each prompt, and the
continuation is forced token by token from the cache as the form stores it. Bits per token, and how often the most
likely token is that of the plain cache; bytes of the cache that are taken before an answer's last token, with the
tokens that are not coded yet.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import kv
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice

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
    start = time.perf_counter()
    followed = kv.play(model, kv.chunks(bench, scale, seed), scale, "full", choice)
    seconds = time.perf_counter() - start
    truth = _plain(scale, settings.data, settings.model, settings.device, seed)
    after = [size for i, size in enumerate(followed.cache_bytes) if i % scale.answer == scale.answer - 1]
    return Measurement(
        metrics={
            "bits_per_token": sum(followed.nats) / len(followed.nats) / math.log(2),
            "held_bytes": sum(after) / len(after),
            "agreement": sum(a == b for a, b in zip(followed.best, truth, strict=True)) / len(truth),
        },
        cost=Cost(seconds=seconds, tokens=len(followed.nats)),
        data=bench.corpus.record,
        model=bench.model_record(model, "small decoder, trained"),
    )


@functools.lru_cache(maxsize=8)
def _plain(scale: Scale, data: str | None, model_name: str | None, device: str, seed: int) -> tuple[int, ...]:
    """What the plain cache finds most likely at every place."""
    bench, model = training.pretrained(Settings(scale=scale, data=data, model=model_name, device=device), seed)
    baseline = registry.port("cacheform").baseline
    return tuple(kv.play(model, kv.chunks(bench, scale, seed), scale, "full", baseline).best)
