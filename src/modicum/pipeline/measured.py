"""What was measured on this machine and holds for later plans too (traces, fixed costs), by what was measured.

One JSON file per machine and set of versions in the user's cache folder. A file that cannot be read or written
costs a new measurement, never a plan.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from modicum import __version__
from modicum.budget import machine
from modicum.core.files import fingerprint, read_json, write_json

MOST = 2000  # entries kept; the oldest go first


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modicum"


def machine_key() -> dict[str, Any]:
    """What a measurement depends on beside its own key."""
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "faiss-cpu", "tokenizers")}
    here = machine.describe()
    return {
        "modicum": __version__,
        "versions": versions,
        "machine": [platform.node(), here["cpu"], here["cores"]],
        "python": sys.version,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


class Memo:
    """`once(key, measure)`: measured now, or what an earlier plan measured. `path` None keeps it in memory alone."""

    def __init__(self, path: Path | None = None):
        self.path, self.values = path, {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError):
                self.values = dict(read_json(path))

    @classmethod
    def of_machine(cls) -> Memo:
        return cls(cache_folder() / f"measured-{fingerprint(machine_key())}.json")

    def once(self, key: Any, measure: Callable[[], Any]) -> Any:
        name = fingerprint(repr(key))
        if name not in self.values:
            self.values[name] = measure()
            self._save()
        return self.values[name]

    def _save(self) -> None:
        if self.path is not None:
            while len(self.values) > MOST:
                self.values.pop(next(iter(self.values)))
            with contextlib.suppress(OSError):
                write_json(self.path, self.values)
