"""Print the cost estimate of every stage of a recipe, and refuse a recipe that exceeds its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe: a file, or a name such as quickstart (modicum ls recipes).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE, e.g. budget.memory=2GiB.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory that would be used.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print the cost estimate of every stage (parameters, FLOPs, bytes, seconds on this machine); a dry run."""
    import json
    import sys

    from modicum.pipeline import plan as planning
    from modicum.pipeline.models import with_models
    from modicum.pipeline.recipe import load

    made = with_models(load(recipe, overrides or []), lambda line: print(line, file=sys.stderr))
    cost_estimate = planning.make_plan(made)
    print(json.dumps(cost_estimate, indent=2) if as_json else planning.bill_text(cost_estimate))
    planning.require_fits(made, cost_estimate, out or Path("runs") / made.name)
