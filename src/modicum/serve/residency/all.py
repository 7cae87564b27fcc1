"""all: every weight in memory, read once.

    resident bytes = the weights' bytes,   read per token = 0

No paper. What the others are measured against. No departures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from modicum.model.decoder import Decoder
from modicum.model.elastic import nbytes
from modicum.serve.residency import Residency
from modicum.serve.residency._store import blank, load_dense, write_dense


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class All(Residency):
    config: Config

    def prepare(self, model: Decoder, folder: Path, tokens_NT: Tensor | None) -> None:
        write_dense(model, folder, lambda name: True)

    def load(self, folder: Path) -> Decoder:
        model = blank(folder)
        load_dense(model, folder)
        return model.eval()

    def stats(self, model: Decoder) -> dict[str, float]:
        return {"resident_bytes": nbytes(model), "read_bytes": 0, "reads": 0}
