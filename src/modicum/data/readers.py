"""Reading: a folder, a file, a data set of the Hugging Face hub, or the Python installation itself.

`find` lists the units of a source (names and sizes, no content); `read` gives one unit's documents. A bad
file never stops a run: it becomes a `Drop` with its reason. Order is by name, so it is the same everywhere.
Hidden files and folders, `__pycache__` and `node_modules` are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from modicum.core.errors import MissingExtra, UserError
from modicum.core.files import fingerprint
from modicum.data import formats, records
from modicum.data.document import Document, Drop

SKIPPED_FOLDERS = {"__pycache__", "node_modules"}
# In the Python installation: what is not part of it, and its tests.
NOT_PYTHON = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
PYTHON_TESTS = {"test", "tests", "idle_test"}
PYTHON_SUFFIXES = {".py", ".txt", ".rst", ".md"}
# Reasons of dropped documents that say a file is damaged or not what was meant: text is missing that should be there.
DAMAGE = ("unreadable", "bad-json", "bad-record", "long-line", "no-records", "no-text-field")


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """max_document_bytes: longer text files are split at a line, other longer documents are dropped.
    text_field: the field or column of JSON records and tables with the text. limit_bytes: read about this much
    of each source, files chosen by a hash of their names. tests: read the Python installation's test packages too."""

    max_document_bytes: int = 4 << 20
    text_field: str = "text"
    limit_bytes: int | None = None
    tests: bool = False


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One file or data set to read. id: prefix of its documents' ids; stamp: changes when the content does."""

    id: str
    kind: str
    path: str
    nbytes: int
    stamp: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find(source: str, config: ReadConfig, *, label: str | None = None, exclude: Iterable[Path] = ()) -> list[Unit]:
    """The units of one source, sorted by id. Raises UserError if there is nothing to read.

    source: `python`, `python:PACKAGE`, `hub:NAME[:CONFIG][@SPLIT]`, or a path. exclude: folders not to enter.
    """
    if source == "python":
        units = list(_python(config, label or "python"))
    elif source.startswith("python:"):
        units = [_topics(unit) for unit in _path(_package(source.removeprefix("python:")), label, set())]
    elif source.startswith("hub:"):
        require_hub()
        name = source[4:]
        if not name.strip(":@"):
            raise UserError(f"{source!r} names no data set; write for example hub:roneneldan/TinyStories")
        units = [Unit(id=label or name, kind="hub", path=name, nbytes=config.limit_bytes or 0)]
    else:
        units = list(_path(source, label, {p.resolve() for p in exclude}))
    if not units:
        raise UserError(
            f"{source} holds no files to read; give a folder of text, Markdown, HTML, PDF, code, WARC, JSONL, CSV or "
            "Parquet files"
        )
    if config.limit_bytes is not None and units[0].kind != "hub":
        units = _limited(units, config.limit_bytes)
    return sorted(units, key=lambda unit: unit.id)


def default_label(source: str) -> str:
    """The prefix of the ids of a source's documents."""
    return source[4:] if source.startswith("hub:") else (Path(source).resolve().name or "root")


def _path(source: str, label: str | None, exclude: set[Path]) -> Iterator[Unit]:
    root = Path(source).expanduser()
    if not os.path.lexists(root):
        raise UserError(f"{source} does not exist; give a folder, a file, `python` or hub:NAME")
    label = label or default_label(str(root))
    if not root.is_dir():
        yield _unit(root, label)
        return
    for folder, folders, files in os.walk(root, onerror=lambda error: None):
        here = Path(folder)
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".") and f not in SKIPPED_FOLDERS and (here / f).resolve() not in exclude
        )
        for name in sorted(files):
            if not name.startswith("."):
                yield _unit(here / name, f"{label}/{(here / name).relative_to(root).as_posix()}")
        for name in folders:  # a folder that cannot be listed is a dropped document, not a gap
            if not os.access(here / name, os.R_OK | os.X_OK):
                yield Unit(
                    id=f"{label}/{(here / name).relative_to(root).as_posix()}",
                    kind="unreadable",
                    path=str(here / name),
                    nbytes=0,
                )


def _unit(path: Path, id_: str) -> Unit:
    try:
        info = path.stat()
    except OSError:
        return Unit(id=_clean(id_), kind="unreadable", path=str(path), nbytes=0)
    kind = formats.kind_of(path) if stat.S_ISREG(info.st_mode) else "special"
    return Unit(
        id=_clean(id_), kind=kind, path=str(path), nbytes=info.st_size, stamp=f"{info.st_size}-{info.st_mtime_ns}"
    )


def _topics(unit: Unit) -> Unit:
    """The language reference's topics are a document each, also where their package is read by itself."""
    return replace(unit, kind="pydoc") if unit.path.endswith("/pydoc_data/topics.py") else unit


def _clean(name: str) -> str:
    """File names need not be valid text; ids must be."""
    return name.encode("utf-8", "backslashreplace").decode()


def _package(name: str) -> str:
    """The folder of an installed package, found without importing it."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError(f"python:{name} is no installed package; write python:numpy, or python for Python itself")
    return folders[0]


def _python(config: ReadConfig, label: str) -> Iterator[Unit]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = NOT_PYTHON | (set() if config.tests else PYTHON_TESTS)
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith((".", "config-")))
        for name in sorted(files):
            path = here / name
            if path.suffix in PYTHON_SUFFIXES and not name.startswith(("_sysconfigdata", ".")):
                relative = path.relative_to(root).as_posix()
                unit = _unit(path, f"{label}/{relative}")
                if relative == "pydoc_data/topics.py":
                    unit = Unit(**unit.as_dict() | {"kind": "pydoc"})
                yield unit


def _limited(units: list[Unit], limit: int) -> list[Unit]:
    taken: list[Unit] = []
    size = 0
    for unit in sorted(units, key=lambda unit: fingerprint(unit.id)):
        if taken and size + unit.nbytes > limit:
            continue
        taken.append(unit)
        size += unit.nbytes
    return taken


def require_hub() -> None:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra("datasets", "hub", "reading hub:NAME")


def read(unit: Unit, config: ReadConfig) -> Iterator[Document | Drop]:
    """The documents of one unit; any error becomes a Drop."""
    if unit.kind == "unreadable":
        yield Drop(unit.id, "unreadable", _why(unit.path))
    elif unit.kind == "special":
        yield Drop(unit.id, "not-a-file", "a pipe, socket or device")
    elif unit.kind == "hub":
        yield from _hub(unit, config)
    else:
        try:
            yield from formats.READERS[unit.kind](unit.path, unit.id, config)
        except (OSError, EOFError) as error:
            yield Drop(unit.id, "unreadable", _short(error))


def _why(path: str) -> str:
    try:
        (os.listdir if os.path.isdir(path) else os.stat)(path)
    except OSError as error:
        return _short(error)
    return "cannot be opened"


def _short(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


def _hub(unit: Unit, config: ReadConfig) -> Iterator[Document | Drop]:
    """Records of `NAME[:CONFIG][@SPLIT]`, streamed; the whole set is never on disk or in memory."""
    require_hub()
    import datasets

    name, _, split = unit.path.partition("@")
    name, _, subset = name.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises its own, the hub's and the network's
        raise UserError(
            f"hub:{unit.path} cannot be opened: {_short(error)}. Write hub:NAME, "
            "hub:NAME:CONFIG or hub:NAME@SPLIT, and check the name and the network"
        ) from None
    size = 0
    for i, row in enumerate(rows):
        item = records.record(dict(row), f"{unit.id}#{i}", unit.id, config)
        yield item
        if isinstance(item, Document) and config.limit_bytes is not None:
            size += item.nbytes
            if size >= config.limit_bytes:
                return
