"""What every stage costs before it does any work worth the name: measured on a miniature of the recipe.

The whole road is walked once over a few short texts with a model of two thin layers, each stage in a
process of its own, exactly as a real run would. What that takes is the fixed part of a stage's time and
memory (interpreter, libraries, first calls); planners add to it what grows with the size of the work.
The figures are kept in the user's cache folder, by machine, versions and the methods chosen.
"""

from __future__ import annotations

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
from modicum.pipeline.context import Run, stages_of
from modicum.pipeline.measured import cache_folder, machine_key
from modicum.pipeline.recipe import Recipe, resolved
from modicum.pipeline.worker import environment

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
        for name in stages_of(small):
            done = subprocess.run(
                [sys.executable, "-m", "modicum.pipeline.worker", str(run.folder), name, "600", str(os.getpid())],
                capture_output=True,
                text=True,
                check=False,
                env=environment(),
            )
            if done.returncode in (130, -2):
                raise KeyboardInterrupt
            if done.returncode:
                failed = run.stage(name) / "failed.json"
                told = read_json(failed)["message"] if failed.is_file() else done.stderr.strip().splitlines()[-1:]
                raise ModicumError(f"the rehearsal of {name} on a miniature failed: {told}")
        records = {name: run.done(name) for name in stages_of(small)}
        return {name: record["measured"] for name, record in records.items() if record}
