"""shortgpt: whole layers dropped, those that change the residual stream's direction least.

    influence_i = 1 - E cos(x_i, x_i+1)   over calibration tokens, x_i and x_i+1 what layer i is given and gives

The `drop` layers of least influence are taken out at once; the others keep their weights and order, and the result is a
plain model with fewer layers. Men et al. 2024, arXiv:2403.03853, section 3. Departs: nothing is trained after it, and
the variant that drops one run of layers by angular distance (Gromov et al. 2024, arXiv:2403.17887) is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from modicum.compress.compressors import BlockJob, Compressor
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.shorter import without


@dataclass(frozen=True, kw_only=True)
class Config:
    drop: Annotated[int, Field(ge=0)] = 3  # layers to take out


TOY = Config(drop=1)
CLAIM = {"figure": "a quarter of Llama-2-13B's layers gone, 95% of its MMLU kept", "where": "section 4",
         "scale": "13B parameters"}  # fmt: skip
SWEEP = ("drop=3", "drop=6")


class ShortGpt(Compressor):
    requires = frozenset({"calibration_text"})
    leaves = "shape"
    streams: ClassVar[tuple[str, ...]] = ("original",)
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._sums: dict[int, list[float]] = {}  # by layer: sum of cosines, tokens

    def check(self, shape: DecoderConfig) -> None:
        if self.config.drop >= shape.layers:
            raise UserError(f"shortgpt: drop={self.config.drop} leaves none of {shape.layers} layers; drop fewer")

    def block(self, job: BlockJob) -> None:
        pass

    def observe(self, index: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
        cosines_BT = torch.nn.functional.cosine_similarity(x_BTD.double(), y_BTD.double(), dim=-1)
        total = self._sums.setdefault(index, [0.0, 0])
        total[0] += float(cosines_BT.sum())
        total[1] += cosines_BT.numel()

    def influence(self) -> list[float]:
        """Of each layer, in order."""
        return [1 - total / count for _, (total, count) in sorted(self._sums.items())]

    def finish(self, model: Decoder) -> Decoder:
        influence = self.influence()
        return without(model, set(sorted(range(len(influence)), key=lambda i: influence[i])[: self.config.drop]))

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums}

    def set_state(self, state: dict[str, Any]) -> None:
        self._sums = {int(index): list(sums) for index, sums in state["sums"].items()}
