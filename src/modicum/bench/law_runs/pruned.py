"""Dense runs and runs that are pruned on the way, to several sparsities and over several windows (average-params)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from modicum.bench import training
from modicum.bench.law_runs._training import QUICK, Scale, decoder, nats
from modicum.bench.measurement import Settings
from modicum.core.choice import Choice

LENGTHS = (0.25, 0.5, 1.0)  # of the scale's tokens
PRUNED: dict[str, dict[str, Any]] = {
    "dense": {},
    "half": {"sparsity": 0.5},
    "most": {"sparsity": 0.75},
    "early": {"sparsity": 0.5, "start": 0.1, "end": 0.4},
}
SCALE = Scale(sizes=((64, 2), (96, 3), (128, 4)))
SMALL = Scale(**QUICK)


def rows(settings: Settings, seed: int, done: set[str], domain: str) -> Iterator[list[dict[str, Any]]]:
    """One row per run: `average_parameters` over its tokens, and `parameters`, those that are left at its end."""
    bench, scale = training.Bench.of(settings), settings.scale
    texts = bench.corpus.heldout_texts()
    for size in scale.sizes:
        for length in LENGTHS:
            for name, knobs in PRUNED.items():
                run = f"{size[0]}x{size[1]}, {length:g} of the tokens, {name}, seed {seed}"
                if run in done:
                    continue
                tokens = round(length * scale.tokens)
                model = decoder(bench, size, seed)
                whole = model.config.parameters()
                methods: dict[str, Any] = {"surgery": Choice("surgery", "average-params", knobs)} if knobs else {}
                stream = bench.stream(seed, tokens=tokens, **methods)
                result = bench.train(model, seed, stream, tokens=tokens, **methods)
                left = sum(int(p.count_nonzero()) for p in model.parameters()) if knobs else whole
                yield [
                    {
                        "run": run,
                        "seed": seed,
                        "pruned": name,
                        "parameters": left,
                        "dense_parameters": whole,
                        "average_parameters": result.average_parameters or whole,
                        "tokens": result.tokens,
                        "flops": result.flops,
                        "loss": nats(bench, model, texts),
                    }
                ]
