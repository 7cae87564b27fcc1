"""Fit a scaling law to run records; predict a larger run and the best use of a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.core.errors import UserError


def predict(
    runs: Annotated[
        Path | None,
        typer.Argument(
            help="Run records: a run directory (or a folder of them), or .jsonl, .csv or .parquet with parameters, "
            "tokens and loss, or a score (and run, final if several rows belong to one run)."
        ),
    ] = None,
    law: Annotated[
        str | None,
        typer.Option(
            help="Form of law, with knobs: chinchilla, power:x=tokens, ... [default: chinchilla; onset for run "
            "directories]"
        ),
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="Point to predict: parameters=1e9,tokens=2e10 (repeat for more).")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Compute to spend best, e.g. 1e20flop.")] = None,
    columns: Annotated[
        str, typer.Option(help="Names in the table where they differ: parameters=params,loss=val_loss.")
    ] = "",
    level: Annotated[float, typer.Option(help="Fraction of new runs that the interval covers.")] = 0.95,
    cut: Annotated[
        float | None,
        typer.Option(help="Back-test: fit on this share of the runs (smallest FLOPs first), predict the rest."),
    ] = None,
    leave_out: Annotated[
        str | None, typer.Option(help="Back-test: predict each value of this column (family, ...) from all the others.")
    ] = None,
    buy: Annotated[
        list[str] | None,
        typer.Option(
            help="A run you can afford, as --at (repeat): which narrows the interval of the first --at most; or "
            "1e18flop: the runs of the fitted sizes and halves and doubles within it."
        ),
    ] = None,
    runs_for: Annotated[
        str | None, typer.Option(help="Which runs the law asks for within this compute, e.g. 1e17flop; needs no RUNS.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the fit as JSON (hitchhikers-laws:transfer=FILE).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write an HTML figure here, with intervals and held-out runs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws behind the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Fit a scaling law to run records; predict a larger run and the best use of a budget."""
    from modicum.budget import units
    from modicum.cli._runs import clean, pairs, read, suited
    from modicum.core import registry
    from modicum.core.files import write_text
    from modicum.laws.backtest import backtest
    from modicum.laws.backtest import leave_out as left_out
    from modicum.laws.table import rename

    if runs_for is not None:
        method = registry.build("law", law or "chinchilla")
        specs = [spec.as_dict() for spec in method.runs(units.parse(runs_for, "flops"))]
        print("\n".join(map(json.dumps, specs)))
        return
    if runs is None:
        raise UserError("give run records, for example runs.csv; or --runs-for 1e17flop to see which to make")
    points = _points(at or [])
    flops = units.parse(budget, "flops") if budget else None
    table = rename(read(runs), pairs(columns, "--columns parameters=params"))
    choice = suited(law, table)
    law, method = str(choice), registry.build("law", choice)
    table = clean(table, method.target)
    fit = method.fit(table, seed)
    predictions = method.predict(fit, points, level) if points else None
    best = method.optimum(fit, flops, level) if flops else None
    offers = _offers(method, fit, points, buy, level) if buy else []
    parts = left_out(table, leave_out, law=law, level=level, seed=seed) if leave_out else None
    tried = backtest(table, None, cut, law=law, level=level, seed=seed) if cut is not None else None
    spread = dict(zip(fit.parameters, (float(v) ** 0.5 for v in fit.covariance_QQ.diagonal()), strict=True))
    if save:
        write_text(save, json.dumps(fit.as_dict()))
    if plot:
        from modicum.laws.plot import figure

        heldout = [row for part in (tried, parts) if part for row in _rows(part)]
        chart = figure(method, fit, table, points or None, level, heldout=heldout)
        write_text(plot, chart.to_html(include_plotlyjs=True))
    if as_json:
        result: dict[str, Any] = {
            "law": law,
            "points": fit.points,
            "runs": fit.runs,
            "method": fit.method,
            "parameters": fit.parameters,
            "standard_errors": spread,
            "covariance": fit.covariance_QQ.tolist(),
            "residual": fit.residual,
        }
        if predictions:
            result["predictions"] = [point | row for point, row in zip(points, predictions.rows(), strict=True)]
        if best:
            result["optimum"] = best.as_dict()
        if offers:
            result["buy"] = offers
        if tried:
            result["backtest"] = tried
        if parts:
            result["leave_out"] = parts
        print(json.dumps(result, indent=2))
        return
    print(f"{law}: {fit.points} rows of {fit.runs} runs, mean residual {fit.residual:.2%}, spread by {fit.method}")
    for name, value in fit.parameters.items():
        print(f"  {name:<8} {value:.5g}  ± {spread[name]:.2g}")
    if predictions:
        for point, row in zip(points, predictions.rows(), strict=True):
            where = ", ".join(f"{k} {v:.4g}" for k, v in point.items())
            print(
                f"at {where}: {method.target} {row['mean']:.4f}, {level:.0%} of such runs within "
                f"{row['low']:.4f} to {row['high']:.4f}"
            )
    if best:
        print(
            f"with {best.flops:.4g} FLOPs: {best.parameters:.4g} parameters "
            f"({best.parameters_interval[0]:.3g} to {best.parameters_interval[1]:.3g}) on "
            f"{best.tokens:.4g} tokens "
            f"({best.tokens_interval[0]:.3g} to {best.tokens_interval[1]:.3g}), loss {best.loss:.4f} "
            f"({best.loss_interval[0]:.4f} to {best.loss_interval[1]:.4f})"
        )
    for offer in offers:
        where = ", ".join(f"{k} {offer[k]:.4g}" for k in method.reads if k in offer)
        print(f"buy {where}: the interval becomes {offer['width']:.4f} wide, {offer['narrows']:.0%} narrower")
    if parts:
        kind = "mean error" if method.target == "loss" else "mean error (absolute)"
        for name, part in parts["parts"].items():
            print(f"without {name}: {kind} {part['error']:.2%} on {part['held_out']}, {part['coverage']:.0%} inside")
        for name, why in parts["refused"].items():
            print(f"without {name}: refused, {why}")
        print(f"left out in turn: {kind} {parts['error']:.2%}, {parts['coverage']:.0%} inside the {level:.0%} interval")
    if tried:
        print(
            f"back-test: fitted on {tried['fitted_runs']} runs up to {tried['cut']:.3g} FLOPs, predicted "
            f"{tried['held_out']} larger: mean error {tried['error']:.2%}, bias {tried['bias']:+.2%}, "
            f"{tried['coverage']:.0%} inside the {level:.0%} interval"
        )
    if plot:
        print(f"figure: {plot}")


def _rows(tested: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out rows of a back-test, or of each part of one."""
    rows: list[dict[str, Any]] = tested.get("rows") or [
        row for part in tested["parts"].values() for row in part["rows"]
    ]
    return rows


def _offers(
    method: Any, fit: Any, points: list[dict[str, float]], texts: list[str], level: float
) -> list[dict[str, Any]]:
    """Candidate runs by what they tell about the first point."""
    from modicum.budget import units
    from modicum.laws.plan import affordable
    from modicum.laws.plan import buy as ranked

    if not points:
        raise UserError("--buy narrows the interval of a target: name it with --at parameters=1e9,tokens=2e10")
    candidates: list[dict[str, float]] = []
    for text in texts:
        if "=" in text:
            candidates += _points([text])
        else:
            candidates += affordable(fit, units.parse(text, "flops"))
    return ranked(method, fit, points[0], candidates, level)


def _points(texts: list[str]) -> list[dict[str, float]]:
    from modicum.budget import units
    from modicum.cli._runs import pairs

    points = []
    for text in texts:
        point = {}
        for name, value in pairs(text, "--at parameters=1e9,tokens=2e10").items():
            kind = name if name in ("tokens", "flops") else None
            quantity = units.kind_of(value)
            if quantity is None or quantity[0] not in ("number", kind):
                raise UserError(f"--at {name}={value}: {value!r} is not a number; write for example {name}=1e9")
            point[name] = quantity[1]
        points.append(point)
    return points
