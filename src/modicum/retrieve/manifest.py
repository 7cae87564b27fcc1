"""Files of a saved folder with their sizes and checksums, so that damage is seen before it is searched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modicum.core import files
from modicum.core.errors import CorruptError, UserError

FULL_BYTES = 256 << 20  # larger files are checked by size unless everything is asked for: reading them takes long


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative path: {bytes, sha256}} of every file under `folder`."""
    return {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": files.sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def verify(folder: Path, listed: dict[str, dict[str, Any]], *, everything: bool = False) -> None:
    """Raise `CorruptError` for a file that is missing, of another length, or (up to `FULL_BYTES`) altered."""
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise CorruptError(f"{path} is missing; build the index again with: modicum index SOURCE --out FOLDER")
        if path.stat().st_size != expected["bytes"]:
            raise CorruptError(
                f"{path} has {path.stat().st_size} bytes, {expected['bytes']} were written; build the index again"
            )
        if (everything or expected["bytes"] <= FULL_BYTES) and files.sha256(path) != expected["sha256"]:
            raise CorruptError(f"{path} does not match its checksum; build the index again")


def read_header(folder: Path, name: str, kind: str, make: str) -> dict[str, Any]:
    """The JSON object in `folder/name`; a `UserError` where there is none, a `CorruptError` where it is damaged."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} is not a saved {kind} (it has no {name}); make one with: {make}")
    try:
        header = files.read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is damaged ({error}); build the {kind} again") from None
    if not isinstance(header, dict):
        raise CorruptError(f"{path} is damaged (not a JSON object); build the {kind} again")
    return header
