"""Evidence records: one JSON line per measurement, in `evidence/PORT/KEY.jsonl`.

A record says what was measured (method, every knob, seed), what came out (metrics, seconds, bytes, FLOPs) and which
claim of the paper it stands beside. Its settings stand in its lab's file (`labs`). Two keys decide what it is good for:
records of one `lab` may be compared; a record whose `code` differs from today's hash of the files behind it is stale.
The commit is there to be read, and decides nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modicum.bench import labs
from modicum.bench.labs import SCHEMA, Lab
from modicum.core import registry
from modicum.core.errors import CorruptError, UserError

SHARED = ("model", "data", "axes", "machine", "versions", "claim")  # kept in the lab's file, each value once


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement of one method at one seed."""

    lab: Lab
    method: str
    choice: str  # as typed: "lora:rank=4"
    knobs: dict[str, Any]  # resolved, defaults included
    baseline: str
    seed: int
    code: str  # hash of the files that decide the result; "" where it is not known
    model: dict[str, Any]  # name, shape, parameters, weights' checksum
    data: dict[str, Any]  # name, checksum, bytes
    metrics: dict[str, float]
    seconds: float
    peak_bytes: float  # of the process, absolute
    flops: float
    axes: dict[str, dict[str, str]]
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    time: str  # UTC, ISO 8601
    claim: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def has(self, name: str) -> bool:
        """Whether there is a value of this name."""
        return name in self.metrics or name in ("seconds", "peak_bytes", "flops")

    def value(self, name: str) -> float:
        """A metric, or one of seconds, peak_bytes, flops. Raises `KeyError` if it was not measured."""
        if name in self.metrics:
            return float(self.metrics[name])
        if name in ("seconds", "peak_bytes", "flops"):
            return float(getattr(self, name))
        raise KeyError(name)

    def identity(self) -> tuple[str, str, str, int]:
        """Two records with the same identity measured the same thing; the later one counts."""
        return self.lab.id, self.method, json.dumps(self.knobs, sort_keys=True, default=str), self.seed


def record_path(folder: Path, port: str, method: str) -> Path:
    return folder / port / f"{method}.jsonl"


def append(folder: Path, record: Record) -> Path:
    """Add a record to its method's file in the evidence folder, and what is new of its settings to its lab's."""
    fields = json.loads(json.dumps(asdict(record), ensure_ascii=False, default=_plain))
    del fields["lab"]
    names = labs.intern(folder, record.lab, {key: fields[key] for key in SHARED})
    path = record_path(folder, record.lab.port, record.method)
    append_line(path, {"lab": record.lab.id} | fields | names)
    return path


def append_line(path: Path, fields: dict[str, Any]) -> None:
    """Add one line and flush it to disk, so that a killed bench keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(fields, ensure_ascii=False, default=_plain) + "\n"
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill left half a line: end it, `read` skips it
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch, and anything with a text form."""
    return value.item() if hasattr(value, "item") else str(value)


def read(folder: Path, port: str) -> list[Record]:
    """All records of a port in the order they were made, later ones replacing earlier ones of the same identity.

    Lines that are not JSON (cut by a kill) are left out. Raises `CorruptError` for a record of another schema, with
    fields missing or whose lab's file lacks what it refers to.
    """
    records: dict[tuple[str, str, str, int], Record] = {}
    known: dict[str, tuple[Lab, dict[str, Any]]] = {}
    for path in sorted((folder / port).glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                continue
            record = _joined(folder, fields, known, f"{path}:{number}")
            records.pop(record.identity(), None)
            records[record.identity()] = record
    return sorted(records.values(), key=lambda record: record.time)


def _joined(folder: Path, fields: dict[str, Any], known: dict[str, tuple[Lab, dict[str, Any]]], where: str) -> Record:
    """A line with its lab and what it shares put in; `known` keeps the labs that were read."""
    if fields.get("schema") != SCHEMA:
        raise CorruptError(
            f"{where} has schema {fields.get('schema')}, this version reads {SCHEMA}; remove the line and measure again"
        )
    try:
        name = fields["lab"]
        if name not in known:
            known[name] = labs.read(folder, name)
        lab, shared = known[name]
        return Record(**fields | {key: shared[fields[key]] for key in SHARED} | {"lab": lab})
    except (TypeError, KeyError) as error:
        raise CorruptError(
            f"{where} is not an evidence record, or its lab's file lacks what it refers to ({error}); remove that line"
        ) from None


def folder(given: Path | None = None) -> Path:
    """Where records are: the folder given, the checkout's `evidence/`, or `./evidence`."""
    if given is not None:
        if given.exists() and not given.is_dir():
            raise UserError(f"{given} is a file; --evidence takes a folder")
        return given
    home = checkout()
    return (home or Path.cwd()) / "evidence"


def checkout() -> Path | None:
    """The source checkout this package runs from, or None for an installed one."""
    home = registry.ROOT.parents[1]
    return home if (home / "pyproject.toml").exists() and registry.ROOT.parent.name == "src" else None


@functools.cache
def commit() -> str:
    """Commit of the checkout; `-dirty-HASH` is added when the source differs from it.

    Outside a checkout, the installed version.
    """
    home = checkout()
    head = _git(home, "rev-parse", "HEAD") if home else None
    if home is None or not head:
        return f"modicum-{versions()['modicum']}"
    change = (_git(home, "diff", "HEAD", "--", "src") or "") + "".join(
        path + hashlib.sha256((home / path).read_bytes()).hexdigest()
        for path in (_git(home, "ls-files", "--others", "--exclude-standard", "--", "src") or "").splitlines()
        if (home / path).is_file()
    )
    suffix = f"-dirty-{hashlib.sha256(change.encode()).hexdigest()[:8]}" if change.strip() else ""
    return head[:12] + suffix


def _git(folder: Path | None, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    installed = {"python": platform.python_version()}
    for package in ("modicum", "torch", "numpy", "transformers", "faiss-cpu"):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.lower().startswith(("model name", "hardware")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """CPU, cores, threads in use, memory in bytes and GPU names (no host name)."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }
