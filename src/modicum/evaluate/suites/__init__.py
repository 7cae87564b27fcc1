"""Suites: named lists of tasks, one file each, a task with its knobs per line.

`modicum eval MODEL --tasks base` runs `base.txt` of this folder; `--tasks @FILE` a list of your own. A line may be
empty or a comment that begins with `#`.
"""

from __future__ import annotations

from pathlib import Path

from modicum.core.errors import UserError, unknown

FOLDER = Path(__file__).parent


def names() -> dict[str, Path]:
    """The suites that come with modicum, by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.txt"))}


def tasks(name: str) -> list[str]:
    """The tasks of a suite, in order; `@FILE` reads a file. Raises UserError for one that is not there or is empty."""
    if name.startswith("@"):
        file = Path(name[1:]).expanduser()
        if not file.is_file():
            raise UserError(f"--tasks {name}: no file {file}; it would hold one task with its knobs per line")
    elif name in names():
        file = names()[name]
    else:
        raise unknown("suite", name, names())
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    listed = [line for line in lines if line and not line.startswith("#")]
    if not listed:
        raise UserError(f"{file} names no task; write one with its knobs per line, such as copy:length=64")
    return listed
