"""Forms that train from scratch: bits per byte against bytes of parameters and optimizer, at equal tokens.

The form stands in every linear layer but the head of a fresh decoder; embedding, head and norms stay dense.
Each form, and dense training, is given its own rate, found once on a seed that no measurement uses.

Bytes are counted as Han et al. 2024 (arXiv:2406.02214, table 2) count them: two for each trained parameter
and two for each of AdamW's two moments, plus what says where stored entries lie.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Settings
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import ModicumError, UserError
from modicum.model.decoder import Decoder
from modicum.train.loop import TrainResult

AXES = Axes(quality=Axis("pretrained_bits_per_byte"), cost=Axis("training_bytes", "lower", "bytes"))
TARGETS = ("layers.*",)
SEARCH_SEED = 7_919_000  # of the rate alone: nothing trained on it is reported
STATE_BYTES = 3 * 2  # a parameter and two moments, in 16 bits


def applies(choice: Choice) -> bool:
    """Whether the form starts afresh instead of taking over a trained weight."""
    method: Any = registry.load("linear", choice.method).cls
    return method.fit_error is None and "adapter" not in method.provides


def measure(bench: training.Bench, choice: Choice, seed: int, start: float) -> tuple[dict[str, float], TrainResult]:
    """start: the rate at which the search begins."""
    rate = _tuned(bench.settings, str(choice), start)
    bits, model, result = _trained(bench, choice, seed, rate)
    return {"pretrained_bits_per_byte": bits, "pretraining_rate": rate, **count(model)}, result


def count(model: Decoder) -> dict[str, float]:
    """training_bytes of the whole model and of its layers alone, and parameters trained."""

    def state(module: Any) -> int:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        where = sum(b.nbytes for n, b in module.named_buffers() if not b.is_floating_point())
        return STATE_BYTES * trained + where

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "training_bytes": state(model),
        "layer_training_bytes": state(model.layers),
        "pretrained_parameters": trained,
    }


def _trained(bench: training.Bench, choice: Choice, seed: int, rate: float) -> tuple[float, Decoder, TrainResult]:
    model = bench.model(seed)
    dense = choice.method == registry.port("linear").baseline
    result = bench.train(model, seed, rate=rate, form=None if dense else choice, targets=TARGETS)
    return bench.bits(model), model, result


@functools.lru_cache(maxsize=64)
def _tuned(settings: Settings, choice: str, start: float) -> float:
    bench = training.Bench.of(settings)

    def bits(rate: float) -> float:
        try:
            return _trained(bench, Choice.parse("linear", choice), SEARCH_SEED, rate)[0]
        except UserError:
            raise
        except ModicumError:  # it diverged
            return math.inf

    return tune(bits, start, most=4)  # three factors of two to choose from, or one more at the edge


def tune(loss: Callable[[float], float], start: float, factor: float = 2.0, most: int = 8) -> float:
    """The rate of least `loss` among start x factor^k: from `start` downhill until it rises on both sides."""
    losses = {0: loss(start)}
    while len(losses) < most:
        best = min(losses, key=lambda k: losses[k])
        after = next((k for k in (best - 1, best + 1) if k not in losses), None)
        if after is None:
            break
        losses[after] = loss(start * factor**after)
    return start * factor ** min(losses, key=lambda k: losses[k])
