"""law: relative error on held-out larger runs, with the coverage and width of the interval.

Runs come from a table given with --data (.jsonl, .csv, .parquet with parameters, tokens, loss; other names by
--scale parameters=NAME,...), of which every seed takes a random part. Without one, a table is drawn from
the Chinchilla law with the parameters of Besiroglu et al. 2024 (arXiv:2404.10102, Table 1) and 0.5% of
noise per run, which shows the machinery and favours that form: compare laws on real tables.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core.choice import Choice
from modicum.core.files import fingerprint, sha256

AXES = Axes(quality=Axis("relative_error"), cost=Axis("fit_seconds", "lower", "s"))
TIER = "laptop"
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658


@dataclass(frozen=True, kw_only=True)
class Scale:
    cut: float = 0.6  # share of the runs, smallest first, that is fitted
    by: str = "flops"  # what "larger" means: flops, parameters or tokens
    part: float = 0.8  # share of a given table's runs that one seed sees
    noise: float = 0.005  # of the table that is drawn when none is given
    sizes: int = 6  # model sizes of that table, each at as many token counts
    parameters: str = ""  # column names of a given table, where they differ
    tokens: str = ""
    loss: str = ""
    run: str = ""


QUICK = Scale(sizes=4)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    from modicum.laws.backtest import backtest

    scale: Scale = settings.scale
    runs, data = _table(settings.data, scale, seed)
    names = {n: getattr(scale, n) for n in ("parameters", "tokens", "loss", "run") if getattr(scale, n)}
    start = time.perf_counter()
    found = backtest(runs, names, scale.cut, law=choice, by=scale.by, seed=seed)
    seconds = time.perf_counter() - start
    metrics = {
        "relative_error": found["error"],
        "bias": found["bias"],
        "coverage_95": found["coverage"],
        "interval_width": found["width"],
        "fit_seconds": seconds,
        "fitted_runs": found["fitted_runs"],
        "held_out": found["held_out"],
    }
    return Measurement(metrics=metrics, cost=Cost(seconds=seconds), data=data)


def _table(source: str | None, scale: Scale, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns, and the data's record."""
    rng = np.random.default_rng(seed)
    if source is None:
        runs = draw(scale.sizes, scale.noise, rng)
        return runs, {"name": "drawn from the Chinchilla law", "checksum": fingerprint(runs)}
    from modicum.laws.table import read_runs

    runs = read_runs(source)
    labels = runs.get(scale.run or "run") or list(range(len(next(iter(runs.values())))))
    distinct = list(dict.fromkeys(labels))
    kept = {distinct[i] for i in rng.permutation(len(distinct))[: max(2, round(scale.part * len(distinct)))]}
    part = {
        name: [v for v, label in zip(column, labels, strict=True) if label in kept] for name, column in runs.items()
    }
    return part, {"name": Path(source).name, "checksum": sha256(source)[:16]}


def draw(sizes: int, noise: float, rng: np.random.Generator) -> dict[str, list[float]]:
    """Runs of 20 M to 2 G parameters at 5 to 80 tokens per parameter."""
    n_GG = np.repeat(np.geomspace(2e7, 2e9, sizes), sizes)
    d_GG = n_GG * np.tile(np.geomspace(5, 80, sizes), sizes)
    loss = (E + A / n_GG**ALPHA + B / d_GG**BETA) * np.exp(noise * rng.standard_normal(len(n_GG)))
    return {
        "parameters": n_GG.tolist(),
        "tokens": d_GG.tolist(),
        "loss": loss.tolist(),
        "flops": (6 * n_GG * d_GG).tolist(),
    }
