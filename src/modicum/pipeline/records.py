"""What finished runs say about larger ones: one row per training run from scratch, for a scaling law.

A run directory has such runs in its `pretrain` stages and in the proxies of its `predict` stages. One law describes
runs of one recipe only: `comparable` keeps the largest group with the same corpus, tokenizer, schedule, optimizer,
rate, batch and row length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError
from modicum.core.files import fingerprint
from modicum.pipeline.context import Run
from modicum.pipeline.recipe import Recipe, load
from modicum.pipeline.stages import predict, pretrain

SIZES = ("parameters", "shape", "heads", "time", "tokens")  # of a pretrain section: what differs between rungs


def is_run(folder: Path) -> bool:
    return (folder / "run.yaml").is_file()


def run_records(folder: Path) -> list[dict[str, Any]]:
    """The training runs in a run directory, or in the run directories of a folder.

    Rows: run, parameters, tokens, loss (held-out nats per token), seconds, vocabulary, schedule, and settings, a
    fingerprint of everything else that decides the loss. Raises UserError where there is none.
    """
    folders = [folder] if is_run(folder) else sorted(p for p in folder.iterdir() if p.is_dir() and is_run(p))
    rows = [row for each in folders for row in _records(Run(each))]
    if not rows:
        raise UserError(
            f"{folder} holds no finished training run; give a run directory (runs/NAME) with pretrain or predict stages"
        )
    return rows


def comparable(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The largest group of runs that differ in size and tokens alone (the latest of equal ones), and the names of the
    others."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["settings"], []).append(row)
    kept = max(reversed(groups.values()), key=len)
    return kept, [row["run"] for row in rows if row["settings"] != kept[0]["settings"]]


def _records(run: Run) -> Iterator[dict[str, Any]]:
    recipe = load(run.folder / "run.yaml")
    for entry in recipe.entries:
        record = run.done(entry.name)
        if record is None:
            continue
        figures, section = record["figures"], recipe.section(entry.name)
        if isinstance(section, pretrain.Section) and _fresh(recipe, entry.name):
            loss = figures["heldout_loss"]
            if loss is not None:
                yield _row(run, recipe, entry.name, entry.name, figures | {"loss": loss})
        elif isinstance(section, predict.Section) and _fresh(recipe, str(section.of)):
            for proxy in figures["proxies"]:
                yield _row(run, recipe, str(section.of), f"{entry.name}/{proxy['run']}", proxy)


def _fresh(recipe: Recipe, name: str) -> bool:
    """Whether a pretrain stage begins from scratch: a model that goes on has seen other tokens before."""
    return not recipe.sources(name)["model"] and recipe.section(name).model is None


def _row(run: Run, recipe: Recipe, pretrained: str, label: str, figures: dict[str, Any]) -> dict[str, Any]:
    section = recipe.section(pretrained).model_dump(mode="json")
    corpus = recipe.sources(pretrained)["corpus"][-1]
    record = run.done(corpus) or {"fingerprint": "", "figures": {}}
    same = {k: v for k, v in section.items() if k not in SIZES} | {"corpus": record["fingerprint"]}
    return {
        "run": f"{run.folder.name}/{label}",
        "parameters": figures["parameters"],
        "tokens": figures["tokens"],
        "loss": figures["loss"],
        "seconds": figures["seconds"],
        "vocabulary": record["figures"].get("vocab_size"),
        "schedule": str(section["schedule"]),
        "settings": fingerprint(same),
    }
