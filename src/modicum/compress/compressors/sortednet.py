"""sortednet: a prefix of the model: its first layers, key/value groups and MLP channels.

    layers 0 .. n - 1 with the final norm and head;  of each the first groups and channels

For models that were trained for it (`modicum pretrain --objective sortednet`); of any other model the prefix is the
control. `sort` puts the important channels and groups first before cutting (by the product of their norms), as such a
training run does when it begins; of its result they are sorted already. What is written is a plain model, of the
family `modicum` only where layers come to differ. Valipour et al. 2023, arXiv:2309.00255, section 3. Departs: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from modicum.compress.compressors import BlockJob, Compressor
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.submodel import Submodel, cut, sort_by_importance


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: Annotated[int, Field(ge=0)] = 0  # that stay, from the first on; 0: all
    groups: Annotated[float, Field(gt=0, le=1)] = 1.0  # key/value groups of each layer, as a fraction
    mlp: Annotated[float, Field(gt=0, le=1)] = 0.5  # MLP channels
    sort: bool = False


NOT_MEASURABLE = (
    "the bench compresses published models, which were not trained for it; there it says what shortgpt and loram say "
    "better"
)


class SortedNet(Compressor):
    leaves = "shape"
    config: Config

    def check(self, shape: DecoderConfig) -> None:
        if self.config.layers > shape.layers:
            raise UserError(f"sortednet: layers={self.config.layers} of {shape.layers}; take fewer")
        if self._sub(shape).whole(shape):
            raise UserError("sortednet: nothing is cut; give layers=, groups= or mlp= below the whole")

    def _sub(self, shape: DecoderConfig) -> Submodel:
        return Submodel.of(shape, range(self.config.layers or shape.layers), self.config.groups, self.config.mlp)

    def block(self, job: BlockJob) -> None:
        pass

    def finish(self, model: Decoder) -> Decoder:
        if self.config.sort:
            sort_by_importance(model)
        return cut(model, self._sub(model.config))
