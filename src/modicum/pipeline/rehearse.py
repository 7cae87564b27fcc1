"""What every stage costs before it does any work worth the name: measured on a miniature of the recipe.

All stages are run once over a few short texts with a model of two thin layers, each in a process of its own, as in a
real run (most are forks of one process that has loaded the libraries, whose time is added). What that takes is the
fixed part of a stage's time and memory (interpreter, libraries, first calls); planners add to it what grows with the
size of the work. The figures are kept in the user's cache folder, by machine and versions.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from modicum.budget import Cost
from modicum.core.errors import ModicumError
from modicum.core.files import fingerprint, read_json, write_json, write_text
from modicum.pipeline import worker
from modicum.pipeline.context import Run
from modicum.pipeline.measured import cache_folder, machine_key
from modicum.pipeline.recipe import Entry, Recipe, resolved
from modicum.pipeline.section import Strict
from modicum.pipeline.stage import in_order, load_stage, section_of
from modicum.pipeline.worker import environment

UNSEEN = "unseen.json"
MODULES = ("json.decoder", "json.encoder", "textwrap", "string", "heapq", "bisect", "statistics", "fractions")


def miniature(recipe: Recipe, corpus: Path) -> tuple[Recipe, dict[str, dict[str, Any]]]:
    """The recipe's stages, each once, on almost no text and with a model of next to no size; and by stage the
    decisions that it keeps to.

    Of the recipe's methods only those that read text take part. The others are the baselines: their knobs (ranks,
    groups, windows) are chosen for the size of the real model and need not fit this one, and what they cost grows
    with that size, which is what the stages' own plans measure.
    """
    entries: list[Entry] = []
    decisions: dict[str, dict[str, Any]] = {}
    given: set[str] = set()

    def add(key: str, section: Strict) -> None:
        stage = load_stage(key)
        small, decided = stage.miniature(section)
        for kind in stage.needed(small):
            if kind not in given:  # a model, for who adapts a published one
                giver = next(k for k in in_order() if kind in load_stage(k).gives)
                add(giver, section_of(giver)())
        entries.append(Entry(key, key, small))
        decisions[key] = decided
        given.update(stage.gives)

    for entry in recipe.entries:
        if entry.key not in decisions:
            add(entry.key, recipe.section(entry.name))
    general: dict[str, Any] = {"name": "miniature", "corpus": str(corpus), "threads": recipe.threads}
    general |= {"budget": {"time": 600, "memory": None, "disk": None}}
    made = Recipe.model_validate(general).model_copy(update={"entries": tuple(entries), "listed": True})
    return made, decisions


def fixed_costs(recipe: Recipe) -> dict[str, Cost]:
    """Measured cost of each stage of the miniature by its key, from the cache if this machine has rehearsed it."""
    name = fingerprint(machine_key() | {"recipe": resolved(miniature(recipe, Path("corpus"))[0])})
    path = cache_folder() / f"rehearsal-{name}.json"
    if path.is_file():
        return {stage: Cost(**cost) for stage, cost in read_json(path).items()}
    for entry in recipe.entries:
        entry.stage.prepare()
    measured = _walk(recipe)
    write_json(path, measured)
    return {stage: Cost(**cost) for stage, cost in measured.items()}


def _walk(recipe: Recipe) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="modicum-rehearsal-") as folder:
        corpus = Path(folder) / "corpus"
        for module in MODULES:
            file = inspect.getsourcefile(__import__(module, fromlist=["_"]))
            if file:
                write_text(corpus / f"{module}.py", Path(file).read_text(encoding="utf-8"))
        small, decisions = miniature(recipe, corpus)
        run = Run(Path(folder) / "run")
        write_text(run.folder / "run.yaml", resolved(small))
        write_json(run.folder / "plan.json", {"stages": {k: {"decisions": v} for k, v in decisions.items()}})
        for entry in small.entries:
            code = (_alone if entry.stage.alone else _forked)(run, entry.name)
            if code in (130, -2):
                raise KeyboardInterrupt
            if code:
                failed = run.stage(entry.name) / "failed.json"
                reason = read_json(failed)["message"] if failed.is_file() else f"exit code {code}"
                raise ModicumError(f"the rehearsal of {entry.name} on a miniature failed: {reason}")
        records = {entry.name: run.done(entry.name) for entry in small.entries}
        return {
            name: record["measured"] | {"peak_bytes": record["measured"]["peak_bytes"] + _unseen(run, name)}
            for name, record in records.items()
            if record
        }


def _unseen(run: Run, name: str) -> float:
    """Bytes of loaded libraries that a fork shares with its parent without having touched them."""
    path = run.stage(name) / UNSEEN
    return float(read_json(path)) if path.is_file() else 0.0


def _file_bytes() -> int:
    """Resident bytes of mapped files: of libraries, above all. 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssFile:"):
                return int(line.split()[1]) * 1024
    return 0


def _alone(run: Run, name: str) -> int:
    command = [sys.executable, "-m", "modicum.pipeline.worker", str(run.folder), name, "600", str(os.getpid())]
    return subprocess.run(command, capture_output=True, check=False, env=environment()).returncode


def _forked(run: Run, name: str) -> int:
    """The stage in a fork of this process, which has loaded the libraries: they are not loaded once per stage."""
    parent, mapped = os.getpid(), _file_bytes()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = worker.main(str(run.folder), name, "600", str(parent))
        write_json(run.stage(name) / UNSEEN, max(mapped - _file_bytes(), 0))
    finally:
        os._exit(code)
