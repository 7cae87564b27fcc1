"""How a model's publisher advises to sample from it: what applies where a request leaves a setting out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from modicum.model import sources

LIMITS = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 100.0),
}


def advised(folder: str | Path) -> dict[str, Any]:
    """Of a model folder: what its generation_config.json says, else what its source by name does; {} without either.

    `do_sample: false` is temperature 0. Values that mean nothing are left out.
    """
    folder = Path(folder)
    given = _read(folder / "generation_config.json")
    chosen = {name: given[name] for name in LIMITS if _usable(name, given.get(name))}
    if given.get("do_sample") is False:
        chosen["temperature"] = 0.0
    if chosen:
        return chosen
    name = _read(folder / sources.RECORD).get("name")
    known = sources.sources()
    return dict(known[name].sampling) if isinstance(name, str) and name in known else {}


def _usable(name: str, value: Any) -> bool:
    low, high = LIMITS[name]
    number = isinstance(value, int if name == "top_k" else int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
