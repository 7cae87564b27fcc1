"""Near misses by room: wrong programs that look right, one change of the sources each (see tests/mutations.py).

Each file has `MUTATIONS`, a tuple; a method's author adds the mistake that is easiest to make to the room's file.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    what: str
    file: str  # below src/modicum
    old: str
    new: str
    test: str  # below tests, as pytest is given it: FILE or FILE::NAME


def mutations() -> list[Mutation]:
    """All of them, room by room."""
    rooms = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [m for room in rooms for m in importlib.import_module(f"{__name__}.{room}").MUTATIONS]
