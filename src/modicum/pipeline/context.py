"""The run directory, and what a stage gets to work with.

RUN/run.yaml            the recipe with every default
RUN/plan.json           the bill made before the first stage, with what it was measured from
RUN/events.jsonl        everything that happened, line by line
RUN/stages/NAME/...     a stage's files; done.json marks it finished: fingerprint, figures, cost
RUN/ledger.json         planned against measured, by stage
RUN/report.html         all of it, to read
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum import __version__
from modicum.budget import Cost, Deadline
from modicum.core.errors import CorruptError, UserError
from modicum.core.events import Events
from modicum.core.files import fingerprint, read_json, write_json
from modicum.pipeline import STAGES
from modicum.pipeline.recipe import Recipe


def stage_module(name: str) -> Any:
    return importlib.import_module(f"modicum.pipeline.stages.{name}")


def stages_of(recipe: Recipe) -> list[str]:
    """Stages of the road that the recipe asks for, in order; one that needs an absent one is refused."""
    wanted = [name for name in STAGES if getattr(recipe, name) is not None]
    for name in wanted:
        for need in stage_module(name).needs(recipe):
            if need not in wanted:
                raise UserError(
                    f"the recipe has {name} but not {need}, which {name} reads; "
                    f"remove '{need}: null' or add '{name}: null'"
                )
    return wanted


def stage_fingerprint(recipe: Recipe, name: str) -> str:
    """Changes exactly when the stage's result may: its own part of the recipe, its inputs', the version."""
    module = stage_module(name)
    inputs = {need: stage_fingerprint(recipe, need) for need in module.needs(recipe)}
    return fingerprint(
        {"stage": name, "version": __version__, "seed": recipe.seed, "uses": module.uses(recipe), "inputs": inputs}
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

    def figures(self, stage: str) -> dict[str, Any]:
        return self.run.figures(stage)


def measured_cost(record: dict[str, Any]) -> Cost:
    return Cost(**record["measured"])
