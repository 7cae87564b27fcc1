"""Run a recipe from text to a served, measured model; finished stages are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe: a file, or a name such as quickstart (modicum ls recipes).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE, e.g. corpus=FOLDER budget.time=5m.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; default runs/RECIPE.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print planned and measured costs as JSON at the end.")
    ] = False,
) -> None:
    """Run a recipe: plan, then every stage; finished stages are skipped, an interrupted one resumes."""
    import sys

    from modicum.pipeline import report
    from modicum.pipeline.recipe import load
    from modicum.pipeline.run import check_folder, run_recipe

    made = load(recipe, overrides or [])
    folder = out or Path("runs") / made.name
    check_folder(folder)
    done = run_recipe(made, folder, notify=lambda line: print(line, file=sys.stderr, flush=True))
    print(report.as_json(done) if as_json else report.as_text(done))
