"""Print the cost estimate of every stage of a recipe, or the size and tokens that earlier runs advise for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe: a file, or a name such as quickstart (modicum ls recipes).")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE, e.g. budget.memory=2GiB.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory that would be used.")] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a recipe: earlier runs (a run directory, a folder of them, or a table), whose law says "
            "which size and how many tokens --budget buys."
        ),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="With --runs: a time or compute, e.g. 30m or 1e15flop.")] = None,
    law: Annotated[
        str | None,
        typer.Option(help="With --runs: the law [default: onset where the vocabulary is known, chinchilla]."),
    ] = None,
    columns: Annotated[
        str, typer.Option(help="With a table: names that differ: parameters=params,loss=val_loss.")
    ] = "",
    level: Annotated[float, typer.Option(help="With --runs: fraction of new runs that the interval covers.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print the cost estimate of every stage (parameters, FLOPs, bytes, seconds on this machine), a dry run; or, with
    --runs and --budget, the size and tokens that earlier runs advise."""
    import json
    import sys

    from modicum.core.errors import UserError

    if runs is not None:
        if recipe is not None:
            raise UserError("give a recipe to estimate, or --runs and --budget to size a model, not both")
        result = advised(runs, budget, law, columns, level)
        print(json.dumps(result, indent=2) if as_json else advice_text(result))
        return
    if recipe is None:
        raise UserError("name a recipe, for example modicum plan quickstart; or --runs runs/ladder --budget 30m")
    from modicum.pipeline import plan as planning
    from modicum.pipeline.models import with_models
    from modicum.pipeline.recipe import load

    made = with_models(load(recipe, overrides or []), lambda line: print(line, file=sys.stderr))
    cost_estimate = planning.make_plan(made)
    print(json.dumps(cost_estimate, indent=2) if as_json else planning.bill_text(cost_estimate))
    planning.require_fits(made, cost_estimate, out or Path("runs") / made.name)


def advised(path: Path, budget: str | None, law: str | None, columns: str, level: float) -> dict[str, Any]:
    """What a budget buys by the law of earlier runs."""
    from modicum.budget import units
    from modicum.cli._runs import clean, pairs, read, suited
    from modicum.core import registry
    from modicum.core.errors import UserError
    from modicum.laws import plan as plans
    from modicum.laws.table import rename

    quantity = units.kind_of(budget or "")
    if quantity is None or quantity[0] not in ("seconds", "flops"):
        raise UserError(f"--budget {budget or ''!r} is neither a time nor compute; write --budget 30m or 1e15flop")
    table = clean(rename(read(path), pairs(columns, "--columns parameters=params")), "loss")
    choice = suited(law, table)
    method = registry.build("law", choice)
    fit = method.fit(table)
    limit: dict[str, Any] = {quantity[0]: quantity[1]}
    if quantity[0] == "seconds":
        limit["rate"] = plans.seconds_per_token(table)
    best = plans.split(method, fit, level=level, **limit)
    return {"law": str(choice), "runs": fit.runs, "residual": fit.residual, "budget": budget} | best.as_dict()


def advice_text(result: dict[str, Any]) -> str:
    from modicum.core.events import count_text

    def size(row: dict[str, Any]) -> str:
        return f"{count_text(row['parameters'])} parameters on {count_text(row['tokens'])} tokens"

    low, high = (count_text(v) for v in result["parameters_interval"])
    lines = [
        f"{result['law']} on {result['runs']} runs (mean residual {result['residual']:.2%}); with {result['budget']}:",
        f"  {size(result)}: loss {result['loss']:.3f} ({result['loss_interval'][0]:.3f} to "
        f"{result['loss_interval'][1]:.3f} for {result['level']:.0%} of such runs); best size within {low} to {high}",
    ]
    lines += [
        f"  {size(row)}: {row['loss']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        for row in result["rows"]
        if row["parameters"] != result["parameters"]
    ]
    if result["beyond"] > 1:
        lines.append(
            f"  that is {10 ** result['beyond']:.3g} times the compute of the largest run that was fitted: make one in "
            "between first"
        )
    return "\n".join(lines)
