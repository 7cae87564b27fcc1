"""How steps of many rows are computed fastest: measured on this machine, once for each kind of model.

The project's kernels read weights where they lie and are hard to beat in steps of few rows, which memory bounds. A
prompt is bound by products. There the kernels' tiles (AMX), where the processor has them, or the matrix library under
PyTorch may be faster than vectors. So `timings` sends prompts of ROWS tokens through all of them, and `crossover` says
which of the others is the faster one, and from how many rows on. What was measured is kept in the user's cache folder,
by processor, instruction set, threads, version, and the model's shape and stored form; `modicum doctor` prints it.

They sum in another order. With `fast_prefill` a prompt's last bits therefore depend on how it was cut into steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from modicum.budget.machine import cpu_name
from modicum.core.files import cache_home, fingerprint, read_json, write_json
from modicum.model.attach import linears
from modicum.model.decoder import Decoder
from modicum.model.shorter import without
from modicum.serve.backends import Backend, Runner
from modicum.serve.plan import AttentionPlan

ROWS = (32, 128, 512)
REPEATS, LAYERS = 3, 4
MARGIN = 1.1  # so much faster another must be: below it the kernels' exactness is worth more
MOST_TILE_ROWS = 128  # the kernels compute this many rows at a time


@dataclass(frozen=True)
class Timing:
    """Seconds of a step of `rows` prompt tokens by each way, the best of REPEATS. `tiles`: of the kernels, or None."""

    rows: int
    native: float
    torch: float
    tiles: float | None = None

    @property
    def faster(self) -> str:
        other, seconds = min(
            [("torch", self.torch)] + ([("tiles", self.tiles)] if self.tiles is not None else []), key=lambda x: x[1]
        )
        return other if seconds * MARGIN < self.native else "native"


class Measured(Runner):
    """Steps of `least` rows or more go to the last backend, all others to the first that can."""

    def __init__(self, least: int, *backends: Backend):
        super().__init__(*backends)
        self.least = least

    def order(self, plan: AttentionPlan) -> Sequence[Backend]:
        many = sum(work.n for work in plan.works) >= self.least
        return self.backends[::-1] if many else self.backends


def crossover(timings: Sequence[Timing]) -> tuple[str, int] | None:
    """What is faster than the kernels as they are, "torch" or "tiles" at the largest size, and the fewest rows from
    which on something else is; None where they are the fastest there."""
    which, least = "native", 0
    for timing in sorted(timings, key=lambda t: -t.rows):
        if timing.faster == "native":
            break
        which, least = (timing.faster if which == "native" else which), timing.rows
    return None if which == "native" else (which, least)


def timings(model: Decoder, config: Any, engine: Any) -> list[Timing]:
    """Of the model on this machine, from the cache folder or measured now with an `engine`, the class. [] without
    kernels for it."""
    path = cache_home() / "backends.json"
    key = fingerprint(kind(model, config))
    kept = read_json(path) if path.is_file() else {}
    if key in kept:
        return [Timing(**t) for t in kept[key]["timings"]]
    measured = measure(model, config, engine)
    if measured:
        kept[key] = {"kind": kind(model, config), "timings": [asdict(t) for t in measured]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)
    return measured


def kind(model: Decoder, config: Any) -> dict[str, Any]:
    """What a measurement holds for."""
    from modicum.serve import native

    return {
        "cpu": cpu_name(),
        "kernels": native.reason(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": json.loads(json.dumps(asdict(model.config), default=str)),
        "forms": sorted({type(module).__name__ for module in linears(model).values()}),
        "dtype": str(model.dtype),
        "activation_bits": config.activation_bits,
    }


def measure(model: Decoder, config: Any, engine_class: Any) -> list[Timing]:
    """Prompts of ROWS tokens through the model's first LAYERS layers, by each backend."""
    longest = min(max(ROWS), model.config.context_length - 2)
    own = type(config)(
        cache=f"{2 * max(ROWS)}tok",
        max_sequences=1,
        max_batch_tokens=max(ROWS),
        prefix_cache=False,
        activation_bits=config.activation_bits,
    )
    few = without(model, set(range(LAYERS, model.config.layers)))
    engine = engine_class(few, None, own)
    if len(engine.runner.backends) < 2:
        return []
    native, library = engine.runner, Runner(engine.runner.backends[-1])
    first = native.backends[0]
    ways = [("native", native), ("torch", library)] + ([("tiles", native)] if getattr(first, "tiles", False) else [])
    result = []
    for rows in sorted({min(rows, longest) for rows in ROWS}):
        best = {name: math.inf for name, _ in ways}
        for repeat in range(REPEATS + 1):
            for name, runner in ways:
                engine.runner = runner
                if len(ways) > 2:
                    first.use_tiles(1 if name == "tiles" else 0)
                    prompt(engine, rows)  # in working memory of its own, new
                seconds = prompt(engine, rows)
                if repeat:  # the first touches memory and warms caches
                    best[name] = min(best[name], seconds)
        result.append(Timing(rows, best["native"], best["torch"], best.get("tiles")))
    return result


def prompt(engine: Any, rows: int) -> float:
    """Seconds of one step that computes a prompt of so many tokens."""
    from modicum.serve.request import SamplingParams

    ids = torch.randint(1, engine.model.config.vocab_size, (rows,), generator=torch.Generator().manual_seed(rows))
    start = time.perf_counter()
    engine.generate([ids.tolist()], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return time.perf_counter() - start


def choose(runner: Runner, model: Decoder, config: Any, engine: Any) -> Runner:
    """`runner`, its kernels with tiles, or one that sends long steps to the library: what was measured to be faster
    with an `engine`, the class."""
    if len(runner.backends) < 2 or model.device.type != "cpu":
        return runner
    faster = crossover(timings(model, replace(config, fast_prefill=False), engine))
    if faster is None:
        return runner
    which, least = faster
    if which == "torch":
        return Measured(least, *runner.backends)
    runner.backends[0].use_tiles(min(least, MOST_TILE_ROWS))  # type: ignore[attr-defined]
    return runner
