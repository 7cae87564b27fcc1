"""Evidence of evaluations on files of questions: one JSON line per run of `modicum eval`, in `evidence/eval.jsonl`."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.bench import record
from modicum.core.choice import Choice
from modicum.core.files import sha256

if TYPE_CHECKING:
    from modicum.evaluate.run import TaskResult


def append(
    results: Sequence[TaskResult],
    evidence: Path,
    *,
    model: str,
    settings: dict[str, Any],
    harness: Sequence[dict[str, Any]] = (),
) -> Path:
    """Add a run's figures with their errors, what they were measured on, and the harness's figures beside them.

    The seconds are those in which the items were answered, whenever that was: kept items count with their own.
    """
    from modicum.evaluate.run import short

    path = evidence / "eval.jsonl"
    rows: list[dict[str, Any]] = [
        {
            "task": short(result.task),
            "metric": result.metric,
            "figures": result.figures,
            "seconds": sum(float(item.get("seconds") or 0) for item in result.items),
            "file": _file(result.task),
        }
        for result in results
    ]
    fields = {
        "model": model,
        "settings": settings,
        "results": rows,
        **({"harness": [{**row, "task": short(row["task"])} for row in harness]} if harness else {}),
        "seconds": sum(row["seconds"] for row in rows),
        "machine": record.machine(),
        "versions": record.versions(),
        "commit": record.commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    record.append_line(path, fields)
    return path


def _file(task: str) -> dict[str, str]:
    """Name and checksum of the file that a task reads; {} where it reads none."""
    if task.startswith("lm-eval"):
        return {}
    file = getattr(Choice.parse("task", task).config(), "file", "")
    return {"name": Path(file).name, "sha256": sha256(Path(file))} if file else {}
