"""Checkpoints that are whole or not there.

    CHECKPOINTS/step-00000400/model.safetensors       trainable weights (float32 masters) and their buffers
                              PART.safetensors        tensors of the optimizer and of other parts
                              state.json              step, tokens, knobs, data position, parts' values
                              manifest.json           bytes and SHA-256 of each of them

A folder takes its name only when everything in it is on the disk. One that does not match its manifest is
reported, and the one before it is used. Tensors are stored whole, so any number of processes may go on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modicum.core.errors import CorruptError, UserError
from modicum.core.files import atomic_directory, read_json, sha256, tree_bytes, write_json
from modicum.train.callback import join_state, split_state
from modicum.train.parallel import Ranks, gather

VERSION = 1


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name, whole CPU tensor) of `model` or a part, one at a time."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)

    def part(self, name: str) -> dict[str, Any]:
        """A part's state dict, as `Callback.load_state_dict` wants it."""
        return join_state(dict(self.tensors(name)), self.state["parts"].get(name, {}))


class Checkpoints:
    """The checkpoints of a run. `report(path, reason)` is told of damaged ones."""

    def __init__(
        self,
        folder: str | Path,
        keep: int = 2,
        ranks: Ranks | None = None,
        report: Callable[[Path, str], None] = lambda path, reason: None,
    ):
        self.folder, self.keep, self.ranks, self.report = Path(folder), keep, ranks or Ranks(), report

    def all(self) -> list[Path]:
        """Folders of checkpoints, oldest first; not verified."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        parts: Mapping[str, Mapping[str, Any]],
        state: Mapping[str, Any],
    ) -> Path:
        """Write the checkpoint of `step` and drop the oldest beyond `keep`. Every process must call.

        Raises `UserError` if the disk cannot take it; the checkpoints before it stay.
        """
        path = self.folder / f"step-{step:08d}"
        split = {name: split_state(dict(part)) for name, part in parts.items()}
        files = {"model": dict(model)} | {name: tensors for name, (tensors, _) in split.items() if tensors}
        first = self.ranks.first
        whole = {
            name: {k: gather(t, keep=first).contiguous() for k, t in tensors.items()} for name, tensors in files.items()
        }
        if first:
            record = {
                "version": VERSION,
                "step": step,
                "parts": {n: v for n, (_, v) in split.items()},
                **state,
            }
            try:
                self._write(path, whole, record)
            except (OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise UserError(
                    f"cannot write the checkpoint of step {step} to {self.folder} ({reason}); earlier "
                    "ones are whole. Free space, then type the same command to go on"
                ) from None
            for old in self.all()[: -self.keep]:
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)
        self.ranks.wait()
        return path

    @staticmethod
    def _write(path: Path, files: Mapping[str, dict[str, Tensor]], record: Mapping[str, Any]) -> None:
        with atomic_directory(path) as folder:
            for name, tensors in files.items():
                save_file(tensors, folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps(record), encoding="utf-8")
            write_json(
                folder / "manifest.json",
                {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())},
            )

    def latest(self) -> Saved | None:
        """The newest whole checkpoint, the same on every process; None if there is none at all.

        Raises `CorruptError` if there are some and all are damaged.
        """
        step = -1
        if self.ranks.first:
            for left in self.folder.glob(".step-*"):  # what a kill left half-written
                shutil.rmtree(left, ignore_errors=True)
            for path in reversed(self.all()):
                reason = damage(path)
                if reason is None:
                    step = int(path.name[5:])
                    break
                self.report(path, reason)
            else:
                step = -2 if self.all() else -1
        step = self.ranks.agree(step)
        if step == -2:
            raise CorruptError(f"every checkpoint in {self.folder} is damaged; remove it to start again")
        if step == -1:
            return None
        path = self.folder / f"step-{step:08d}"
        return Saved(path, step, read_json(path / "state.json"))

    def bytes(self) -> int:
        return tree_bytes(self.folder) if self.folder.exists() else 0


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if all its files match its manifest."""
    try:
        manifest = read_json(path / "manifest.json")
        if "state.json" not in manifest or "model.safetensors" not in manifest:
            return "its manifest is not complete"
        for name, entry in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
        version = read_json(path / "state.json")["version"]
        return None if version == VERSION else f"it has version {version}, this modicum reads {VERSION}"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest or state cannot be read ({type(error).__name__})"
