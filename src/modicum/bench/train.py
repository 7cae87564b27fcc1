"""train: how fast a training step is beside transformers and peft, on the same weights and batches in the same run.

    modicum bench train [ENGINE or TRAINING ...] [--model MODEL] [--quick] [--json]

Models of two sizes are pretrained, and an adapter is trained on a third, by modicum with its kernels and as written,
by transformers eager and compiled, by peft; each in a process of its own (`bench.engine_worker`), one optimizer step
a turn, round after round. A figure is the median over rounds, a ratio is to the fastest of the others in the same run.
The losses of each step stand beside the rates: whoever computes the same has the same ones, to rounding.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from modicum.bench.ceilings import measure as measure_ceilings
from modicum.bench.engine import Row
from modicum.bench.engine_worker import EngineFailed, Job, Worker
from modicum.bench.train_columns import ADAPTER, Size, prepare
from modicum.core.errors import ModicumError, UserError

OWN = ("modicum", "modicum plain")
PEERS = ("transformers", "transformers compiled", "transformers bf16", "transformers bf16 compiled", "peft")
ENGINES = (*OWN, *PEERS)
COLUMNS = "modicum.bench.train_columns"
QUICK = Size(models=("300k",), vocab=512, length=64, rows=4, micro=2, adapter_rows=2, adapter_micro=1, rounds=2)


def jobs(size: Size, engines: Sequence[str], tasks: Sequence[str]) -> list[Job]:
    """Who trains what of `tasks`."""
    made = []
    for name in engines:
        able = (ADAPTER,) if name == "peft" else (*size.models, ADAPTER) if name in OWN else size.models
        target = "transformers" if name == "peft" else name.replace(" ", "_")
        if wanted := tuple(task for task in able if task in tasks):
            made.append(Job(name, f"{COLUMNS}:{target}", wanted))
    return made


def measure(
    size: Size,
    *,
    names: Sequence[str] = (),
    model: str | None = None,
    limit: float = 300.0,
    more: Sequence[Job] = (),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Everything `modicum bench train` prints, as plain values.

    names limits who takes part and what is trained (sizes, "lora"); model is the one an adapter is trained on (None: a
    small random one); limit: seconds an engine may take to get ready, and for each step; more: further engines.
    """
    from modicum.model import native

    known = (*size.models, ADAPTER)
    if odd := [name for name in names if name not in (*ENGINES, *known)]:
        raise UserError(f"bench train knows {', '.join((*ENGINES, *known))}; got {', '.join(odd)}")
    engines = [name for name in ENGINES if name in names] or ENGINES
    tasks = [name for name in known if name in names] or known
    rows: dict[tuple[str, str], Row] = {}
    skipped: dict[str, str] = {}
    workers: list[Worker] = []
    ceilings: list[dict[str, float]] = []
    steps: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="modicum-bench-") as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        parameters = prepare(folder, size, model, tasks)
        for job in [*jobs(size, engines, tasks), *more]:
            try:
                worker = Worker(job, folder, size, torch.get_num_threads(), limit)
            except EngineFailed as error:
                skipped[job.engine] = str(error)
                continue
            stack.callback(worker.close)
            skipped |= {f"{job.engine}, {task}": why for task, why in worker.skipped.items()}
            if job.engine in OWN and worker.broken:
                raise ModicumError(f"{job.engine} {worker.broken[0]}: {worker.skipped[worker.broken[0]]}")
            workers.append(worker)
        for turn in range(size.rounds + 1):  # first steps allocate and compile; they do not count
            for worker in list(workers):
                try:
                    for task in worker.columns:
                        rate, name = worker.time(task), worker.job.engine
                        if turn:
                            rows.setdefault((name, task), Row(name, task)).rates.append(rate)
                        if progress:
                            progress(f"round {turn}/{size.rounds}: {name}, {task}: {rate:.0f} tokens/s")
                except EngineFailed as error:
                    skipped[worker.job.engine] = str(error)
                    workers.remove(worker)
                    for task in worker.columns:
                        rows.pop((worker.job.engine, task), None)
            ceilings.append(measure_ceilings())
        for worker in workers:
            steps[worker.job.engine] = worker.call(f"{COLUMNS}:losses")
    best = {name: max(c[name] for c in ceilings) for name in ceilings[0]}
    return {
        "rows": [
            row.as_dict() | {"ratio": _ratio(row, rows), "losses": steps[row.engine][row.column]}
            for row in rows.values()
        ],
        "ceilings": best,
        "skipped": skipped,
        "data": "walks over token ids",
        "native": native.reason(),
        "size": asdict(size),
        "model": {"name": model or "random llama-like", "parameters": parameters},
        "threads": torch.get_num_threads(),
    }


def _ratio(row: Row, rows: dict[tuple[str, str], Row]) -> float | None:
    """To the fastest of the others at the same task."""
    others = [r.median for (engine, task), r in rows.items() if task == row.column and engine not in OWN]
    return row.median / max(others) if others else None


def loss_distance(result: dict[str, Any]) -> dict[str, float]:
    """By task, the largest distance of anybody's loss of a step from that of modicum as written, over that loss."""
    distances: dict[str, float] = {}
    base = {row["column"]: row["losses"] for row in result["rows"] if row["engine"] == "modicum plain"}
    for row in result["rows"]:
        pairs = list(zip(row["losses"], base.get(row["column"], []), strict=False))
        if pairs and row["engine"] != "modicum plain" and "bf16" not in row["engine"]:
            far = max(abs(a - b) / b for a, b in pairs)
            distances[row["column"]] = max(distances.get(row["column"], 0.0), far)
    return distances
