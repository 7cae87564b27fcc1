"""Run a recipe: plan, refuse or go, stage by stage; finished stages are skipped by their fingerprint."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modicum.budget import Deadline
from modicum.core.errors import BudgetError, CorruptError, ModicumError, UserError
from modicum.core.events import Events, seconds_text
from modicum.core.files import read_json, write_json, write_text
from modicum.pipeline import plan as planning
from modicum.pipeline.context import Run, stage_fingerprint
from modicum.pipeline.models import with_models
from modicum.pipeline.recipe import Recipe, resolved
from modicum.pipeline.worker import DISK_FULL, environment


class StageFailed(ModicumError):
    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def run_recipe(recipe: Recipe, folder: str | Path, notify: Callable[[str], None] = print) -> Run:
    """Carry out `recipe` in `folder` and return the run. Raises `ModicumError` where it cannot go on."""
    run = Run(Path(folder).resolve())
    fresh = not run.folder.exists()
    try:
        with run.lock("run"):
            recipe = with_models(recipe, notify)
            stages = [entry.name for entry in recipe.entries]
            _require_inputs(recipe, stages)
            deadline = Deadline(recipe.budget.time)
            plan = _plan(recipe, run, notify)
            _walk(recipe, run, stages, plan, deadline, notify)
    finally:
        if fresh and [p.name for p in run.folder.iterdir()] == [".run.lock"]:  # refused: leave nothing behind
            (run.folder / ".run.lock").unlink()
            run.folder.rmdir()
    return run


def _require_inputs(recipe: Recipe, stages: list[str]) -> None:
    """Refuse a corpus or a model that cannot be read before anything is measured."""
    for name in stages:
        stage_fingerprint(recipe, name)
    if recipe.model:
        from modicum.data.tokenizer import Tokenizer
        from modicum.model.folder import find_folder, load_config

        folder = find_folder(recipe.model)
        load_config(folder)
        Tokenizer.load(folder)


def _walk(
    recipe: Recipe, run: Run, stages: list[str], plan: dict[str, Any], deadline: Deadline, notify: Callable[[str], None]
) -> None:
    for name in stages:
        record = run.done(name)
        if record and record["fingerprint"] == stage_fingerprint(recipe, name):
            notify(f"{name}: done already, {seconds_text(record['measured']['seconds'])}")
            continue
        if deadline.passed:
            raise StageFailed(
                f"budget.time={seconds_text(recipe.budget.time or 0)} is used up before {name}; "
                "finished stages are kept, the same command goes on",
                1,
            )
        _run_stage(run, name, plan, deadline, notify)
    _write_ledger(run, stages, plan)
    from modicum.pipeline.report import write_report

    write_report(run)


def _plan(recipe: Recipe, run: Run, notify: Callable[[str], None]) -> dict[str, Any]:
    """The plan on disk if it was made for this very recipe, else a new one."""
    text = resolved(recipe)
    path = run.folder / "plan.json"
    old = (run.folder / "run.yaml").read_text(encoding="utf-8") if (run.folder / "run.yaml").exists() else None
    if old == text and path.is_file():
        try:
            return read_json(path)
        except ValueError:
            notify("plan.json cannot be read; planning again")
    notify("plan: measuring this machine")
    started = time.perf_counter()
    plan = planning.make_plan(recipe)
    planning.require_fits(recipe, plan, run.folder)
    write_json(path, plan)
    write_text(run.folder / "run.yaml", text)
    Events(run.folder / "events.jsonl", "plan").emit("plan", seconds=time.perf_counter() - started, plan=plan)
    notify(planning.bill_text(plan))
    return plan


def _run_stage(run: Run, name: str, plan: dict[str, Any], deadline: Deadline, notify: Callable[[str], None]) -> None:
    planned = plan["stages"].get(name, {}).get("cost", {})
    notify(f"{name}: planned {seconds_text(planned.get('seconds', 0))}")
    arguments = [str(run.folder), name, str(deadline.left), str(os.getpid())]
    command = [sys.executable, "-m", "modicum.pipeline.worker", *arguments]
    process = subprocess.Popen(command, env=environment())
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal has sent the signal to the stage as well; let it keep its work
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        failed = run.stage(name) / "failed.json"
        if failed.is_file():
            failure = read_json(failed)
            raise StageFailed(f"{name}: {failure['message']}", failure["exit_code"])
        if code == DISK_FULL:
            raise StageFailed(
                f"{name}: the disk is full where {run.folder} is; free space, and the same command "
                "goes on, or choose another folder with --out",
                2,
            )
        killed = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = " (the system may have run out of memory)" if code == -9 else ""
        raise StageFailed(f"{name} {killed}{hint}; finished work is kept, the same command goes on from there", 1)


def _write_ledger(run: Run, stages: list[str], plan: dict[str, Any]) -> None:
    rows = {}
    for name in stages:
        record = run.done(name)
        if record is None:
            raise CorruptError(f"stage {name} left no readable done.json in {run.stage(name)}")
        rows[name] = {
            "planned": record["planned"] or plan["stages"].get(name, {}).get("cost", {}),
            "measured": record["measured"],
        }
    write_json(run.folder / "ledger.json", {"stages": rows, "machine": plan.get("machine", {})})


def check_folder(folder: Path) -> None:
    """A folder that holds something else than a run is refused, so that nothing foreign is touched."""
    if folder.is_file():
        raise UserError(f"{str(folder)!r} is a file; give a folder with --out")
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not (folder / "run.yaml").exists()
        and not (folder / ".run.lock").exists()
    ):
        raise UserError(f"{str(folder)!r} holds files that are no run of modicum; choose another with --out")


__all__ = ["BudgetError", "StageFailed", "check_folder", "run_recipe"]
