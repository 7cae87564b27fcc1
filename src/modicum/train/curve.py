"""Reading a run's loss curve back from its events (imports no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modicum.core.events import read_events


def curve(path: str | Path, kind: str = "train", stage: str | None = None) -> list[dict[str, Any]]:
    """Events of `kind` ("train" or "heldout"), one per step in order.

    A killed run repeats the steps after its last checkpoint; of a step told twice the later event counts.
    """
    by_step = {event["step"]: event for event in read_events(path, kind, stage)}
    return [by_step[step] for step in sorted(by_step)]
