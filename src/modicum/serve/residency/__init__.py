"""port residency: which weights are in memory while a model is served, and which wait on disk.

`modicum flash MODEL --with METHOD --out FOLDER` writes a folder with `prepare`; every verb that serves takes it and
loads it with `load`: a decoder whose modules fetch what they need. Shapes: N sequences, T tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.files import read_json
from modicum.core.registry import Method
from modicum.model.decoder import Decoder

BASELINE = "all"
NOTE = "residency.json"  # in a folder: its method and knobs


class Residency(Method):
    """Constructed as `cls(config)`. reads_text: whether `prepare` needs calibration text."""

    reads_text: ClassVar[bool] = False

    def __init__(self, config: Any):
        self.config = config

    def prepare(self, model: Decoder, folder: Path, tokens_NT: Tensor | None) -> None:
        """Write a model's weights into an existing, empty folder. Raises `UserError` for one that it cannot serve."""
        raise NotImplementedError

    def load(self, folder: Path) -> Decoder:
        """The decoder to serve, in eval mode."""
        raise NotImplementedError

    def stats(self, model: Decoder) -> dict[str, float]:
        """`resident_bytes` of weights in memory at most, `read_bytes` and `reads` from disk since loading."""
        raise NotImplementedError


def is_prepared(folder: str | Path) -> bool:
    return (Path(folder) / NOTE).is_file()


def load_prepared(folder: str | Path) -> tuple[Residency, Decoder]:
    """The method and model of a folder that `prepare` wrote, with the knobs that it was written with."""
    if not is_prepared(folder):
        raise UserError(f"{folder} was not written by modicum flash; write it with: modicum flash MODEL --out {folder}")
    note = read_json(Path(folder) / NOTE)
    method: Residency = registry.build("residency", Choice("residency", note["method"], note["knobs"]))
    return method, method.load(Path(folder))


def note(choice: Choice) -> dict[str, Any]:
    """What a folder keeps of the method it was written by."""
    return {"method": choice.method, "knobs": dataclasses.asdict(choice.config())}
