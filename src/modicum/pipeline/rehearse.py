"""What every stage costs before it does any work worth the name: measured on a miniature of the recipe.

All stages are run once over a few short texts with a model of two thin layers, each in a process of its own, as in a
real run (most are forks of one process that has loaded the libraries, whose time is added). What that takes is the
fixed part of a stage's time and memory (interpreter, libraries, first calls); planners add to it what grows with the
size of the work. The figures are kept in the user's cache folder, by machine and versions.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from modicum.budget import Cost
from modicum.core.errors import ModicumError
from modicum.core.files import fingerprint, read_json, write_json, write_text
from modicum.pipeline import STAGES, worker
from modicum.pipeline.context import Run, stages_of
from modicum.pipeline.measured import cache_folder, machine_key
from modicum.pipeline.recipe import Recipe, resolved
from modicum.pipeline.worker import environment

UNSEEN = "unseen.json"
SHAPE = {"width": 64, "layers": 2}
LENGTH, ROWS, STEPS, VOCABULARY = 64, 4, 4, 512
TOKENS = LENGTH * ROWS * STEPS
MODULES = ("json.decoder", "json.encoder", "textwrap", "string", "heapq", "bisect", "statistics", "fractions")


def miniature(recipe: Recipe, corpus: Path) -> Recipe:
    """The recipe's stages on almost no text, with a model of next to no size.

    Of the recipe's methods only those that read text take part. The others are the baselines: their knobs (ranks,
    groups, windows) are chosen for the size of the real model and need not fit this one, and what they cost grows
    with that size, which is what the stages' own plans measure.
    """
    data: dict[str, Any] = {
        "name": "miniature",
        "corpus": str(corpus),
        "seed": 0,
        "threads": recipe.threads,
        "budget": {"time": 600, "memory": None, "disk": None},
        "curate": {"steps": recipe.curate.steps, "vocab_size": VOCABULARY, "heldout": 0.2, "processes": 2},
        "pretrain": {"sequence_length": LENGTH, "batch_tokens": LENGTH * ROWS, "tokens": TOKENS, "time": None},
        "predict": recipe.predict and {},
        "adapt": recipe.adapt
        and {"form": "lora:rank=4", "tokens": 8 * LENGTH, "batch_tokens": 4 * LENGTH, "sequence_length": LENGTH}
        | {"pairs": 16, "heldout_pairs": 8},
        "compress": recipe.compress and {"forms": ["int8"]},
        "ground": recipe.ground and {"passages": 64, "queries": 8, "encoder": "lsa:16", "index": recipe.ground.index},
        "serve": recipe.serve and {"questions": ["What does dumps do?"], "max_tokens": 4},
        "evaluate": {"bytes": 20_000, "speed_tokens": 4},
    }
    data["pretrain"]["dtype"] = recipe.pretrain.dtype
    return Recipe.model_validate(data)


def fixed_costs(recipe: Recipe) -> dict[str, Cost]:
    """Measured cost of each stage of the miniature, from the cache if this machine has rehearsed it before."""
    name = fingerprint(machine_key() | {"recipe": resolved(miniature(recipe, Path("corpus")))})
    path = cache_folder() / f"rehearsal-{name}.json"
    if path.is_file():
        return {stage: Cost(**cost) for stage, cost in read_json(path).items()}
    if recipe.serve:
        from modicum.serve import native

        native.library()  # compiled once for this machine, before anything is timed
    measured = _walk(recipe)
    write_json(path, measured)
    return {stage: Cost(**cost) for stage, cost in measured.items()}


def _walk(recipe: Recipe) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="modicum-rehearsal-") as folder:
        corpus = Path(folder) / "corpus"
        for module in MODULES:
            found = inspect.getsourcefile(__import__(module, fromlist=["_"]))
            if found:
                write_text(corpus / f"{module}.py", Path(found).read_text(encoding="utf-8"))
        small = miniature(recipe, corpus)
        run = Run(Path(folder) / "run")
        write_text(run.folder / "run.yaml", resolved(small))
        decided: dict[str, Any] = {"shape": SHAPE, "tokens": TOKENS, "lr": 1e-3}
        proxies = [{"shape": SHAPE, "tokens": TOKENS * n, "parameters": 1} for n in (1, 2, 3)]
        plan = {"predict": {"proxies": proxies, "main": decided | {"parameters": 100_000}}, "pretrain": decided}
        write_json(run.folder / "plan.json", {"stages": {k: {"decisions": v} for k, v in plan.items()}})
        loading = {"curate": 0.0}
        for name in stages_of(small):
            if name not in loading:
                began = time.perf_counter()
                importlib.import_module("modicum.pipeline.training")  # what the other stages begin with
                loading |= dict.fromkeys(STAGES[1:], time.perf_counter() - began)
            code = _forked(run, name) if loading[name] else _alone(run, name)
            if code in (130, -2):
                raise KeyboardInterrupt
            if code:
                failed = run.stage(name) / "failed.json"
                reason = read_json(failed)["message"] if failed.is_file() else f"exit code {code}"
                raise ModicumError(f"the rehearsal of {name} on a miniature failed: {reason}")
        records = {name: run.done(name) for name in stages_of(small)}
        return {
            name: record["measured"]
            | {
                "seconds": record["measured"]["seconds"] + loading[name],
                "peak_bytes": record["measured"]["peak_bytes"] + _unseen(run, name),
            }
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
