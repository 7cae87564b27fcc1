"""law: error on held-out larger runs, with the coverage and width of the interval.

With --data FOLDER the run tables in it are back-tested by a protocol: of published tables (`--scale
protocol=loss|batch|ladder|pythia|curve|text`, `_law_tables`), or of runs that `bench.law_runs` made
(`protocol=repeated|short|mixed|pruned|mixtures|examples|format` on evidence/runs, `_law_own`); with a table of your own
(.jsonl, .csv, .parquet with parameters, tokens, loss; other names by --scale parameters=NAME,...) every seed takes a
random part of its runs. With --quick and no data a table is drawn from the Chinchilla law with the parameters of
Besiroglu et al. 2024 (arXiv:2404.10102, Table 1) and 0.5% of noise per run, which shows the machinery and favours
that form.

Scores have laws of losses as a baseline too: those are given 1 - score. `error` is relative for losses, absolute for
scores: `set_points`, of a benchmark's mean over its tasks, is judged, `task_points` is the mean error of single tasks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import _law_own as own
from modicum.bench.ports import _law_tables as tables
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.files import fingerprint, sha256

AXES = Axes(quality=Axis("error"), cost=Axis("fit_seconds", "lower", "s"))
TIER = "laptop"
SETS = ("ladder", "pythia")  # protocols whose tasks make one benchmark
PROTOCOLS = tables.PROTOCOLS | own.PROTOCOLS
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658


@dataclass(frozen=True, kw_only=True)
class Scale:
    protocol: str = "loss"  # of published tables (`_law_tables`), or of runs made here (`_law_own`)
    part: float = 0.85  # share of the fitted runs that one seed sees
    cut: float = 0.6  # of a table of your own: share of the runs, smallest first, that is fitted
    by: str = "flops"  # what "larger" means there: flops, parameters or tokens
    drawn: bool = False  # without --data: a table drawn from a law, which says little
    noise: float = 0.005  # of that table
    sizes: int = 6  # model sizes of that table, each at as many token counts
    parameters: str = ""  # column names of a given table, where they differ
    tokens: str = ""
    loss: str = ""
    run: str = ""


QUICK = Scale(drawn=True, sizes=4, part=0.8)


def tier(scale: Scale) -> str:
    """Every protocol runs on published tables; a drawn table says little."""
    return "smoke" if scale.drawn else "laptop"


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    if settings.data is not None and Path(settings.data).is_dir():
        return published(choice, seed, settings)
    if settings.data is None and not settings.scale.drawn:
        raise UserError("laws are compared on real runs: give --data FOLDER with run tables, or a table; or --quick")
    from modicum.laws.backtest import backtest

    scale: Scale = settings.scale
    runs, data = _table(settings.data, scale, seed)
    names = {n: getattr(scale, n) for n in ("parameters", "tokens", "loss", "run") if getattr(scale, n)}
    start = time.perf_counter()
    result = backtest(runs, names, scale.cut, law=adapted(choice, None)[0], by=scale.by, seed=seed)
    seconds = time.perf_counter() - start
    metrics = {
        "error": result["error"],
        "bias": result["bias"],
        "coverage_95": result["coverage"],
        "interval_width": result["width"],
        "fit_seconds": seconds,
        "fitted_runs": result["fitted_runs"],
        "held_out": result["held_out"],
    }
    return Measurement(metrics=metrics, cost=Cost(seconds=seconds), data=data)


def adapted(choice: Choice, case: tables.Case | None) -> tuple[Choice, Any]:
    """The choice with what a case settles (chance), and the method."""
    knobs = dict(choice.knobs)
    fields = getattr(registry.load("law", choice.method).config, "__dataclass_fields__", {})
    if case is not None and case.chance is not None and "chance" in fields and "chance" not in knobs:
        knobs |= {"chance": case.chance}
    if (
        case is not None
        and case.extra.get("mixed")
        and "unique_tokens" not in registry.load("law", choice.method).cls.columns
    ):
        knobs = {"mixed": True} | knobs  # a law that knows nothing of repetition takes such rows only if it must
    if case is not None and "vocabulary" in fields and "vocabulary" in case.extra:
        knobs = {"vocabulary": case.extra["vocabulary"]} | knobs
    made = Choice(choice.port, choice.method, knobs)
    return made, registry.build("law", made)


def published(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    folder = Path(settings.data or "")
    cases = tables.cases(PROTOCOLS, scale.protocol, folder)
    _, law = adapted(choice, None)
    start = time.perf_counter()
    if law.of_sets:
        cases = list(merged(cases))
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    refused = 0
    for case in cases:
        try:
            per_run = predicted(choice, case, scale.part, seed)
        except UserError as reason:
            refused += 1
            if case.chance is None or scale.protocol not in SETS or "chance" not in str(reason):
                continue
            per_run = stays(case)
        rows += per_run
        if case.extra.get("changes") and hasattr(law, "critical_ratio"):
            metrics |= ratio_errors(choice, case, seed)
        if scale.protocol in ("loss", "batch"):
            metrics[f"error_{case.name.replace(' ', '_')}"] = float(np.mean([abs(r["error"]) for r in per_run]))
        if case.extra.get("last"):
            last = case.extra["last"][0]
            metrics["last_value_points"] = metrics.get("last_value_points", 0.0) + sum(
                abs(last - r["truth"]) for r in per_run
            )
    if not rows:
        raise UserError(
            f"{choice} predicts nothing under protocol={scale.protocol}: it reads other columns, or refuses all"
        )
    errors = np.array([r["error"] for r in rows])
    if "last_value_points" in metrics:
        metrics["last_value_points"] /= len(rows)
    if scale.protocol in ("loss", "batch"):  # each table counts alike
        error = float(np.mean([v for n, v in metrics.items() if n.startswith("error_")]))
    elif scale.protocol in SETS:
        error = metrics["set_points"] = set_error(rows)
        if not law.of_sets:
            metrics["task_points"] = float(np.abs(errors).mean())
    else:
        error = float(np.abs(errors).mean())
    seconds = time.perf_counter() - start
    metrics |= {
        "error": error,
        "bias": float(errors.mean()),
        "coverage_95": float(np.mean([r["low"] <= r["truth"] <= r["high"] for r in rows])),
        "interval_width": float(np.mean([r["high"] - r["low"] for r in rows])),
        "fit_seconds": seconds,
        "held_out": len(rows),
        "cases": len(cases) - refused,
        "refused": refused,
    }
    made = scale.protocol in own.PROTOCOLS
    name = own.TABLES.get(scale.protocol, scale.protocol)
    files = [folder / f"{name}.jsonl"] if made else sorted(folder.glob("*.parquet"))
    data = {
        "name": f"{'runs made here' if made else 'published run tables'}, {scale.protocol}",
        "checksum": fingerprint([sha256(f)[:16] for f in files]),
    }
    return Measurement(metrics=metrics, cost=Cost(seconds=seconds), data=data)


def predicted(choice: Choice, case: tables.Case, part: float, seed: int) -> list[dict[str, Any]]:
    """Truth and prediction of each held-out row, in the case's own measure."""
    _, law = adapted(choice, case)
    fit, heldout = dict(case.fit), dict(case.heldout)
    if case.extra.get("changes") and law.target == "loss":
        return as_changes(law, fit, heldout, seed)
    score = "score" in fit
    if law.target == "loss" and score:
        fit |= {"loss": [max(1 - v, 1e-3) for v in fit["score"]]}
    elif law.target not in fit:
        raise UserError(f"the case {case.name} has no {law.target}")
    fit = seen(fit, part if case.own or not case.extra else 1.0, seed, 4 if case.own else 10)
    if not law.checkpoints and not law.of_sets and "run" in fit and not case.extra:
        fit = finished(fit)
    if not law.checkpoints:
        fit.pop("decay_left", None)
    predictions = law.predict(law.fit(fit, seed), heldout)
    errors = []
    absolute = score or law.target == "change"
    truths = heldout["score" if score else law.target]
    for truth, mean, low, high in zip(truths, predictions.mean, predictions.low, predictions.high, strict=True):
        if law.target == "loss" and score:
            mean, low, high = 1 - mean, 1 - high, 1 - low
        error = (mean - truth) if absolute else (mean / truth - 1)
        errors.append({"truth": float(truth), "error": float(error), "low": float(low), "high": float(high)})
    for i, row in enumerate(errors):
        row |= {"model": float(heldout["parameters"][i]) if "parameters" in heldout else 0.0}
    return errors


def as_changes(law: Any, fit: tables.Columns, heldout: tables.Columns, seed: int) -> list[dict[str, Any]]:
    """A law of losses on changes of loss: one fit for each domain fraction, less the loss before."""
    errors = []
    for ratio in dict.fromkeys(fit["ratio"]):
        rows, ahead = (
            {n: [v for v, r in zip(column, t["ratio"], strict=True) if r == ratio] for n, column in t.items()}
            for t in (fit, heldout)
        )
        before = rows["loss"][0] - rows["change"][0]
        predictions = law.predict(law.fit({n: rows[n] for n in (*law.reads, "run", "loss")}, seed), ahead)
        for truth, mean, low, high in zip(
            ahead["change"], predictions.mean, predictions.low, predictions.high, strict=True
        ):
            row = {"truth": float(truth), "error": float(mean - before - truth), "model": float(rows["parameters"][0])}
            errors.append(row | {"low": float(low - before), "high": float(high - before)})
    return errors


def ratio_errors(choice: Choice, case: tables.Case, seed: int) -> dict[str, float]:
    """The critical fraction predicted for the end of the run beside the measured one, and beside a guess of a third."""
    from modicum.laws.forms.cmr import crossing

    _, law = adapted(choice, case)
    fit, heldout = case.fit, case.heldout
    end = max(heldout["tokens"])
    last = sorted(
        (r, c) for r, c, t in zip(heldout["ratio"], heldout["change"], heldout["tokens"], strict=True) if t == end
    )
    ratios, changes = (np.array(v, float) for v in zip(*last, strict=True))
    measured = crossing(ratios, np.maximum.accumulate(changes), law.config.epsilon)
    predicted_ratio = law.critical_ratio(law.fit(fit, seed), end)
    return {
        f"ratio_{case.name}": predicted_ratio["ratio"],
        f"measured_ratio_{case.name}": measured,
        f"ratio_error_{case.name}": abs(predicted_ratio["ratio"] - measured),
        f"third_error_{case.name}": abs(1 / 3 - measured),
    }


def stays(case: tables.Case) -> list[dict[str, Any]]:
    """A task that small models answer at chance, which laws of scores refuse, is predicted to stay there."""
    errors = []
    for i, truth in enumerate(case.heldout["score"]):
        chance = float(case.chance or 0)
        row = {"truth": float(truth), "error": chance - float(truth), "low": chance - 0.1, "high": chance + 0.1}
        errors.append(row | {"model": float(case.heldout["parameters"][i])})
    return errors


def seen(fit: tables.Columns, part: float, seed: int, least: int = 10) -> tables.Columns:
    """A random part of the runs, where there are more than `least` of them."""
    models = fit.get("flops") if "item" in fit else None  # every model answers every item
    labels = fit.get("run") or models or list(range(len(next(iter(fit.values())))))
    distinct = list(dict.fromkeys(labels))
    if len(distinct) <= least or part >= 1:
        return fit
    kept = {distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[: round(part * len(distinct))]}
    return {n: [v for v, label in zip(c, labels, strict=True) if label in kept] for n, c in fit.items()}


def finished(fit: tables.Columns) -> tables.Columns:
    """The last row of each run."""
    last: dict[Any, int] = {}
    for i, (run, tokens) in enumerate(zip(fit["run"], fit["tokens"], strict=True)):
        if run not in last or tokens >= fit["tokens"][last[run]]:
            last[run] = i
    return {n: [c[i] for i in last.values()] for n, c in fit.items()}


def merged(cases: list[tables.Case]) -> Any:
    """One case per benchmark, whose items are its tasks: what a law of item groups reads."""
    for name in dict.fromkeys(case.together for case in cases):
        group = [case for case in cases if case.together == name]
        fit = {n: [v for case in group for v in case.fit[n]] for n in group[0].fit}
        models = dict.fromkeys(group[0].heldout["flops"])
        scores = [
            [
                float(v)
                for case in group
                for v, f in zip(case.heldout["score"], case.heldout["flops"], strict=True)
                if f == at
            ]
            for at in models
        ]
        heldout = {"flops": list(models), "score": [float(np.mean(s)) for s in scores], "parameters": list(models)}
        yield tables.Case(name, fit, heldout, None, name)


def set_error(rows: list[dict[str, Any]]) -> float:
    """Mean over the larger models of |mean over tasks of (prediction - truth)|."""
    models = dict.fromkeys(r["model"] for r in rows)
    return float(np.mean([abs(np.mean([r["error"] for r in rows if r["model"] == m])) for m in models]))


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
