"""curate: read, clean, deduplicate, filter, tokenize and pack the corpus."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from modicum.budget import Cost
from modicum.core.errors import ModicumError
from modicum.core.files import atomic_file, fingerprint, write_json, write_text
from modicum.data.curate import CurateConfig, Curation, curate
from modicum.data.readers import ReadConfig, find
from modicum.data.stages import group_bytes
from modicum.pipeline.context import Context, Run
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe, resolved
from modicum.pipeline.worker import environment

TEXT = 6  # bytes of memory that a process takes for each byte of text it has in hand
PARTS = 32  # files of a sample, so that both sides of the held-out split get some
SAMPLE = 4 << 20  # bytes that the planner curates, for this stage's own cost and for the stages that follow


@functools.cache
def _corpus(source: str, limit: int | None) -> tuple[str, int]:
    """(fingerprint of the files' names, sizes and times, bytes)."""
    units = find(source, ReadConfig(limit_bytes=limit))
    return fingerprint([[u.id, u.kind, u.stamp] for u in units]), sum(u.nbytes for u in units)


def _limit(recipe: Recipe) -> int | None:
    return None if recipe.curate.max_bytes is None else int(recipe.curate.max_bytes)


def needs(recipe: Recipe) -> tuple[str, ...]:
    return ()


def uses(recipe: Recipe) -> dict[str, Any]:
    section = recipe.curate.model_dump(exclude={"processes", "engine", "group_bytes"})
    recall = recipe.pretrain.recall
    return {
        "corpus": recipe.corpus,
        "files": _corpus(recipe.corpus, _limit(recipe))[0],
        "curate": section,
        "tokenizer": recipe.model,
    } | ({"recall": recall.vocabulary} if recall else {})


def _sources(recipe: Recipe, folder: Path) -> list[str]:
    """The corpus and, for a model that learns to recall, a sample of that text: its words belong in the vocabulary."""
    if recipe.pretrain.recall is None:
        return [recipe.corpus]
    from modicum.evaluate.recall import sample

    path = folder / "playground"
    for i in range(PARTS):
        file = path / f"{i:02}.txt"
        if not file.is_file():
            with atomic_file(file, "w") as handle:
                handle.write("\n\n".join(sample(f"{recipe.seed}/{i}", int(recipe.pretrain.recall.vocabulary) // PARTS)))
    return [recipe.corpus, str(path)]


def _config(recipe: Recipe, limit: int | None, **more: Any) -> CurateConfig:
    return CurateConfig(
        steps=recipe.curate.steps,
        vocab_size=recipe.curate.vocab_size,
        reserved=recipe.curate.reserved,
        tokenizer=recipe.model,
        heldout=recipe.curate.heldout,
        read=ReadConfig(limit_bytes=limit),
        seed=recipe.seed,
        group_bytes=None if recipe.curate.group_bytes is None else int(recipe.curate.group_bytes),
        **more,
    )


def plan(planner: Planner) -> StagePlan:
    """The stage itself on a small sample, which the stages that follow are planned with.

    Every process has its group of documents in hand, in the sample a small one: memory grows with the group.
    """
    recipe = planner.recipe
    total = _corpus(recipe.corpus, _limit(recipe))[1]
    processes, size = recipe.curate.processes, min(total, SAMPLE)
    group = group_bytes(total, recipe.curate.group_bytes)
    small = max(min(group, size // processes), 1)
    alone, fixed = _alone(planner, size, small), planner.fixed.get("curate", Cost())
    made = Curation.load(planner.scratch / "curate-alone" / "stages" / "curate" / "data")
    tokens = {split: made.count("tokens", split) for split in ("train", "heldout")}
    scale = total / size
    held = TEXT * (min(group * processes, total) - small * processes)
    cost = Cost(
        tokens=(tokens["train"] + tokens["heldout"]) * scale,
        seconds=max(alone.seconds - fixed.seconds, 0.0) * scale,
        peak_bytes=max(alone.peak_bytes - fixed.peak_bytes, 0.0) + max(held, 0),
        disk_bytes=_bytes(made) * scale,
    )
    return StagePlan(
        cost,
        {
            "train_tokens": tokens["train"] * scale,
            "vocab_size": made.tokenizer().vocab_size,
            "bytes_per_token": made.count("bytes") / made.count("tokens"),
            "sample": str(made.folder),
            "sample_share": size / total,
        },
        f"{size / 2**20:.0f} of {total / 2**20:.1f} MiB curated",
    )


def _alone(planner: Planner, size: int, group: int) -> Cost:
    """What this stage costs on `size` bytes in groups of `group`, run by itself as it will be."""
    run = Run(planner.scratch / "curate-alone")
    recipe = planner.recipe.model_dump()
    recipe["curate"] |= {"max_bytes": size, "group_bytes": group}
    write_text(run.folder / "run.yaml", resolved(Recipe.model_validate(recipe)))
    write_json(run.folder / "plan.json", {"stages": {}})
    subprocess.run(
        [sys.executable, "-m", "modicum.pipeline.worker", str(run.folder), "curate", "600", str(os.getpid())],
        capture_output=True,
        check=False,
        env=environment(),
    )
    record = run.done("curate")
    if record is None:
        raise ModicumError("the curation of a sample failed; type: modicum curate CORPUS --out FOLDER to see why")
    return Cost(**record["measured"])


def _bytes(made: Curation) -> float:
    return sum(made.count("bytes", s) * 0.3 + made.count("tokens", s) * 2 for s in ("train", "heldout"))


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    made = curate(
        _sources(recipe, context.folder),
        context.folder / "data",
        _config(recipe, _limit(recipe)),
        events=context.events,
        engine=recipe.curate.engine,
        processes=recipe.curate.processes,
    )
    steps = [
        {
            "name": b["step"],
            "documents_in": b["documents_in"],
            "documents_out": b["documents_out"],
            "seconds": b["seconds"],
        }
        for b in made.books["steps"]
    ]
    drops: dict[str, int] = {}
    for by_reason in made.drops.values():
        for reason, n in by_reason.items():
            drops[reason] = drops.get(reason, 0) + n
    return {
        "folder": str(made.folder),
        "documents_in": made.books["steps"][0]["documents_in"],
        "documents_out": made.count("documents") + made.count("documents", "heldout"),
        "steps": steps,
        "drops": dict(sorted(drops.items(), key=lambda item: -item[1])),
        "domains": made.books["splits"]["train"]["domains"],
        "tokens_train": made.count("tokens"),
        "tokens_heldout": made.count("tokens", "heldout"),
        "vocab_size": made.tokenizer().vocab_size,
        "bytes_per_token": made.count("bytes") / made.count("tokens"),
        "cost": {"tokens": made.count("tokens") + made.count("tokens", "heldout")},
    }
