"""A lab: what must be equal for two records to be compared.

That is the bench's source, its scale, the limits of the budget, the tier, the contents of data and model, and whether
it ran on CPUs or on CUDA. `evidence/labs/ID.json` says it once for all records of the lab, and holds what they share
besides (machine, versions, axes, claims, shapes), each under a short name that their lines refer to.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modicum.core.errors import CorruptError
from modicum.core.files import fingerprint, read_json, sha256, write_json

SCHEMA = 2
TIERS = ("smoke", "laptop", "gpu")
PROXY_PARAMETERS = 1_000_000  # a model smaller than this one shows that a method runs, and no more
PROXY_TOKENS = 5  # a parameter: trained on fewer, a proxy has hardly left its warm-up
WEIGHTS = (".safetensors", ".gguf", ".json", ".model")


@dataclass(frozen=True, kw_only=True)
class Lab:
    """The settings that records share. `bench` is the hash of the bench's source, "" where it is not known."""

    id: str
    port: str
    tier: str
    device: str  # cpu or cuda
    bench: str
    scale: dict[str, Any]
    budget: dict[str, float]  # limits that were set, by name
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)  # data and model: name and checksum of the files
    schema: int = SCHEMA

    @classmethod
    def of(
        cls,
        port: str,
        *,
        tier: str,
        device: str,
        bench: str,
        scale: dict[str, Any],
        budget: dict[str, float],
        data: str | None,
        model: str | None,
    ) -> Lab:
        """The lab of settings as typed. Raises `UserError` if data or model are not there."""
        scale = plain(scale)
        inputs = {"data": data_of(data)} | ({"model": model_of(model)} if model else {})
        sums = {name: given["checksum"] for name, given in inputs.items()}
        device = "cuda" if device.startswith("cuda") else "cpu"
        name = fingerprint([port, tier, device, bench, scale, budget, sums])
        return cls(id=name, port=port, tier=tier, device=device, bench=bench, scale=scale, budget=budget, inputs=inputs)

    @property
    def settings(self) -> str:
        """What the person who measured chose: equal for labs that differ in the bench's source alone."""
        sums = {name: given["checksum"] for name, given in self.inputs.items()}
        return fingerprint([self.port, self.tier, self.device, self.scale, self.budget, sums])


def plain(scale: dict[str, Any]) -> dict[str, Any]:
    """A scale as it is read again: lists for tuples."""
    return json.loads(json.dumps(scale))


def tier_of(scale: Any, *, quick: bool, model: str | None, device: str, declared: str | None) -> str:
    """How much a measurement can say: `smoke`, `laptop` or `gpu`.

    A quick one is smoke; for others the bench says it of its default scale (`declared`; None for other scales). Else a
    given model of a million parameters is more than smoke, and a trained proxy of so many with five tokens for each.
    """
    if quick:
        return "smoke"
    enough = declared not in ("smoke", None)
    if declared is not None:
        pass
    elif model:
        enough = weights_in(model) >= PROXY_PARAMETERS
    elif all(hasattr(scale, name) for name in ("vocabulary", "width", "layers", "tokens")):
        from modicum.model.config import llama_like

        parameters = llama_like(scale.vocabulary, scale.width, scale.layers).parameters()
        enough = parameters >= PROXY_PARAMETERS and scale.tokens >= PROXY_TOKENS * parameters
    if not enough:
        return "smoke"
    return "gpu" if device.startswith("cuda") else "laptop"


@functools.lru_cache(maxsize=8)
def weights_in(model: str) -> int:
    """Numbers in a model's safetensors files; bytes of its weights where there are none."""
    from modicum.model.folder import find_folder

    total = 0
    for path in sorted(find_folder(model).iterdir()):
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    total += functools.reduce(int.__mul__, tensor["shape"], 1)
        elif path.suffix == ".gguf":
            total += path.stat().st_size
    return total


@functools.lru_cache(maxsize=8)
def data_of(given: str | None) -> dict[str, str]:
    """Name and checksum of the files given, or of the Python installation's."""
    from modicum.data.readers import ReadConfig, find

    name = given or "python"
    path = Path(name).expanduser()
    if name.startswith("hub:"):
        return {"name": name, "checksum": fingerprint(name)}
    if given is None or name == "python" or not path.exists():  # `find` says what is wrong with a wrong path
        files = {unit.id: Path(unit.path) for unit in find(name, ReadConfig())}
    else:
        paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files = {p.relative_to(path if path.is_dir() else path.parent).as_posix(): p for p in paths}
    return {"name": path.name or name, "checksum": _content(files)}


@functools.lru_cache(maxsize=8)
def model_of(given: str) -> dict[str, str]:
    from modicum.model.folder import find_folder

    files = {p.name: p for p in sorted(find_folder(given).iterdir()) if p.suffix in WEIGHTS}
    return {"name": Path(given).name, "checksum": _content(files)}


def _content(files: dict[str, Path]) -> str:
    return fingerprint([(name, sha256(path)) for name, path in sorted(files.items())])


def lab_path(folder: Path, name: str) -> Path:
    return folder / "labs" / f"{name}.json"


def intern(folder: Path, lab: Lab, values: dict[str, Any]) -> dict[str, str]:
    """Put the lab and `values` into its file, those that are not there yet; returns the short name of each."""
    names = {key: _name(value) for key, value in values.items()}
    path = lab_path(folder, lab.id)
    with _locked(path.parent):
        entry = read_json(path) if path.exists() else asdict(lab) | {"shared": {}}
        new = {names[key]: value for key, value in values.items() if names[key] not in entry["shared"]}
        if new or not path.exists():
            entry["shared"] |= new
            write_json(path, entry)
    return names


def read(folder: Path, name: str) -> tuple[Lab, dict[str, Any]]:
    """A lab and what its records share. Raises `CorruptError` if its file is missing or of another schema."""
    path = lab_path(folder, name)
    if not path.exists():
        raise CorruptError(f"{path} is missing: records refer to it; restore it, or remove them and measure again")
    try:
        entry = read_json(path)
        shared = entry.pop("shared")
        lab = Lab(**entry)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path} is not a lab ({error}); restore it") from None
    if lab.schema != SCHEMA:
        raise CorruptError(f"{path} has schema {lab.schema}, this version reads {SCHEMA}")
    return lab, shared


def _name(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: two benches of one lab must not lose each other's entries."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a Unix: one bench at a time there
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
