"""Evidence of answers over a folder of questions: one JSON line per run, in `evidence/qa.jsonl`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from modicum.bench import record
from modicum.evaluate.grounded import Graded


def append(
    graded: Graded,
    evidence: Path,
    *,
    model: dict[str, Any],
    data: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    seconds: float,
    peak_bytes: float,
) -> Path:
    """Add a run's figures by arm with their intervals, the paired differences, and what they were measured with."""
    path = evidence / "qa.jsonl"
    fields = {
        "model": model,
        "data": data,
        "settings": settings,
        "seed": seed,
        **graded.as_dict(),
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "machine": record.machine(),
        "versions": record.versions(),
        "commit": record.commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    record.append_line(path, fields)
    return path
