"""self-distill-further: pretraining goes on twice, the second time from the start, drawn to the first one's features.

For a model theta_0 and text of a new domain: go on with pretraining as usual, which gives phi; then begin again *from
theta_0* with

    loss = objective + weight * ||f_theta(x) - f_phi(x)||^2 / D,     no gradient through phi

f the hidden states after the final norm, phi fixed; then fine-tune. The restart is the method: going on from phi would
only hold it where it is. It costs twice the steps of plain further pretraining.

    modicum pretrain domain --out once  --model base
    modicum pretrain domain --out twice --model base --distiller self-distill-further:teacher=once/model

Lee et al. 2023 (ICLR), arXiv:2210.02871, section 3.2. Departs: the squared distance is divided by the width D, so that
`weight` means the same at any width; next-token prediction in place of the masked objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from modicum.core.errors import UserError
from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched, square_sum

CLAIM = {"figure": "above further pretraining and other regularisers in text classification",
         "where": "abstract", "scale": "ViT and RoBERTa base"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher: str = ""  # the model that was further pretrained; "": the model as the run begins (an L2 to the start)
    weight: Annotated[float, Field(ge=0)] = 1.0


class SelfDistillFurther(Distiller):
    config: Config

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        if seen.h_BTD.shape[-1] != taught.h_BTD.shape[-1]:
            raise UserError(
                f"self-distill-further compares a model with itself: the teacher is {taught.h_BTD.shape[-1]} wide, the "
                f"student {seen.h_BTD.shape[-1]}; use distil-feature for models of two widths"
            )
        return {"feature": self.config.weight * square_sum(seen.h_BTD, taught.h_BTD, mask_BT)}
