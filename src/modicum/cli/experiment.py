"""Run a study of small trainings on a curated folder: a table of effects, or the mixture to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._options import options_of
from modicum.evaluate.study import StudySpec


@options_of(StudySpec, flags={"batch_tokens": "--batch"})
def experiment(
    curated: Annotated[Path, typer.Argument(help="A folder made by `modicum curate`.")],
    method: Annotated[str, typer.Argument(help="What to find out: modicum ls experiment.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the trials; a stopped study goes on from it.")],
    spec: StudySpec,
    target_folders: Annotated[
        list[Path] | None,
        typer.Option("--target-folder", help="A curated folder whose held-out text is the target; may be given again."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the number of trials and the cost, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Train the small runs that METHOD asks for on CURATED, and print what they say.

    modicum experiment corpus climb --out runs/climb --tokens 100ktok --target maths
    """
    import dataclasses
    import sys

    from modicum.core import registry
    from modicum.core.choice import Choice
    from modicum.core.events import Events
    from modicum.core.files import read_json
    from modicum.data.curate import Curation
    from modicum.evaluate.experiments import Study
    from modicum.evaluate.study import Corpus, table_text

    choice = Choice.parse("experiment", method)
    cls = registry.load("experiment", choice.method).cls
    others = {folder.name: Curation.load(folder) for folder in target_folders or ()}
    corpus = Corpus.of(Curation.load(curated), cls.reads(choice.config()), cls.compares, others)
    if others and spec.target is None:
        spec = dataclasses.replace(spec, target=tuple(others))
    study = Study(choice, corpus, spec, out)
    cost_estimate = study.estimate()
    if plan:
        print(json.dumps(cost_estimate, indent=2) if as_json else estimate_text(cost_estimate))
        return
    print(estimate_text(cost_estimate), file=sys.stderr)
    study.run(Events(out / "events.jsonl", "experiment"))
    made = read_json(out / "study.json")
    print(json.dumps(made, indent=2) if as_json else table_text(made))


def estimate_text(made: dict[str, Any]) -> str:
    from modicum.core.events import count_text, seconds_text

    cost = made["cost"]
    return (
        f"{made['experiment']}: {made['trials']} trainings of {count_text(cost['parameters'])} parameters"
        + (f" and {made['merges']} merges" if made["merges"] else "")
        + f", {count_text(cost['tokens'])} tokens, {cost['flops']:.3g} FLOPs, about {seconds_text(cost['seconds'])}"
        + (f"; {made['finished']} are finished" if made["finished"] else "")
    )
