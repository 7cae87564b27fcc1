"""The run directory, and what a stage gets to work with.

RUN/run.yaml            the recipe with every default
RUN/plan.json           the bill made before the first stage, with what it was measured from
RUN/events.jsonl        everything that happened, line by line
RUN/stages/NAME/...     a stage's files; done.json marks it finished: fingerprint, figures, cost
RUN/ledger.json         planned against measured, by stage
RUN/report.html         all of it, to read
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum import __version__
from modicum.budget import Deadline
from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Events
from modicum.core.files import fingerprint, read_json, write_json
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.stage import Inputs


def stage_fingerprint(recipe: Recipe, name: str) -> str:
    """Changes exactly when the stage's result may: its own part of the recipe, its inputs', the version."""
    entry = recipe.entry(name)
    inputs = {kind: [stage_fingerprint(recipe, s) for s in given] for kind, given in recipe.sources(name).items()}
    uses = entry.stage.uses(recipe.section(name), recipe, name)
    return fingerprint(
        {"stage": entry.key, "version": __version__, "seed": recipe.seed, "uses": uses, "inputs": inputs}
    )


@dataclass(frozen=True)
class Run:
    """A run directory."""

    folder: Path

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name

    def done(self, name: str) -> dict[str, Any] | None:
        """A finished stage's record: {fingerprint, figures, planned, measured}, or None."""
        path = self.stage(name) / "done.json"
        if not path.is_file():
            return None
        try:
            record = read_json(path)
            return record if {"fingerprint", "figures", "measured"} <= record.keys() else None
        except ValueError:
            return None

    def figures(self, name: str) -> dict[str, Any]:
        record = self.done(name)
        if record is None:
            raise CorruptError(f"stage {name} in {self.folder} has not finished; run the recipe again")
        return record["figures"]

    def inputs(self, recipe: Recipe, name: str) -> Inputs:
        """The artefacts of finished stages that `name` reads."""
        given = {source for sources in recipe.sources(name).values() for source in sources}
        return recipe.inputs(name, {source: self.figures(source) for source in given})

    def finish(self, name: str, record: dict[str, Any]) -> None:
        write_json(self.stage(name) / "done.json", record)

    @contextmanager
    def lock(self, name: str, wait: float = 0.0) -> Iterator[None]:
        """Hold RUN/.NAME.lock; the system lets go of it when the process dies, however it dies."""
        import fcntl
        import time

        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / f".{name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        end = time.monotonic() + wait
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise UserError(
                            f"another process is working in {self.folder}; wait for it, "
                            "or choose another folder with --out"
                        ) from None
                    time.sleep(0.1)
            yield
        finally:
            os.close(handle)


@dataclass
class Context:
    """What a stage's `run` gets. `plan` is the stage's own part of plan.json (sizes it must keep to)."""

    recipe: Recipe
    run: Run
    name: str
    events: Events
    deadline: Deadline
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.run.stage(self.name)
