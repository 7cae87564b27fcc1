"""xbt: a new encoder's vectors, projected into the space of an index that an old encoder made.

    v = phi(new(text)) = unit(W x + U tanh(V x))        of length 1, in the old encoder's dimensions

The folder is what trainer `xbt` leaves: the new encoder, and the projection. Queries encoded so search vectors of the
old encoder, which is not needed; passages encoded so can be added to its index. Jang and Lim 2025 (ICCV),
arXiv:2405.14715.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.core.errors import UserError
from modicum.core.files import read_json
from modicum.retrieve.encoders import Encoder
from modicum.retrieve.encoders._plain import PlainSentence

NOT_MEASURABLE = "it needs a folder of trainer xbt, and an index of another encoder to search"


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str  # a folder that trainer xbt left
    batch: Annotated[int, Field(ge=1)] = 64  # texts of one forward pass


class Compatible(Encoder):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        from safetensors.torch import load_file

        from modicum.retrieve.compatible import Projection

        super().__init__(config, device)
        folder = Path(config.model)
        plain = PlainSentence.open(folder, device) if (folder / "xbt.json").is_file() else None
        if plain is None:
            raise UserError(f"{folder} has no xbt.json beside an encoder; train one with the trainer xbt")
        shape = read_json(folder / "xbt.json")
        self._plain = plain
        self._phi = Projection(shape["new"], shape["old"], shape["hidden"])
        self._phi.load_state_dict(load_file(folder / "phi.safetensors"))
        self._phi.eval()

    def pool(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            vectors: np.ndarray = self._phi(torch.from_numpy(self._plain.encode(texts, self.config.batch))).numpy()
        return vectors
