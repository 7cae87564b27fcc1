"""The stages' own parts of a run's report."""

from __future__ import annotations

from modicum.core.files import read_json
from modicum.pipeline.context import Run
from modicum.pipeline.recipe import load
from modicum.pipeline.stage import Finished, Report


def reports(run: Run) -> list[tuple[Finished, Report]]:
    """Every stage of the ledger with its report: those of low rank first, the others in the order of the run."""
    recipe = load(run.folder / "run.yaml")
    made = []
    for name in read_json(run.folder / "ledger.json")["stages"]:
        entry, section = recipe.entry(name), recipe.section(name)
        inputs = run.inputs(recipe, name)
        done = Finished(run, name, entry.key, entry.stage.block, section, run.figures(name), inputs)
        made.append((done, entry.stage.report(done)))
    return sorted(made, key=lambda pair: pair[1].rank)
