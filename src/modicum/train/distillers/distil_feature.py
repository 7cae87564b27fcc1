"""distil-feature: the student's hidden states are drawn to the teacher's, layer by layer.

    loss = objective + weight * mean over mapped layers i of ||M_i x_s,i - x_t,j||^2 / D_t,   j = round(i L_t / L_s)

with x the residual stream after a layer. M_i is a linear map trained beside the model where the widths differ, and the
identity where they do not. Every `every`-th layer of the student counts, from the last one down. Jiao et al. 2020
(TinyBERT), arXiv:1909.10351, section 3.1, and Romero et al. 2015, arXiv:1412.6550. Departs: hidden states alone,
without attention maps or embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched, map_layers, square_sum


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher: str = ""  # model folder or name; "": the model as the run begins
    weight: Annotated[float, Field(ge=0)] = 1.0
    every: Annotated[int, Field(ge=1)] = 1  # of the student's layers, counted from the last one


class DistilFeature(Distiller):
    config: Config

    def student_layers(self, student: Any) -> tuple[int, ...]:
        return tuple(range(student.config.layers - 1, -1, -self.config.every))

    def teacher_layers(self, student: Any) -> tuple[int, ...]:
        mapped = map_layers(student.config.layers, self.teacher.config.layers)
        return tuple(mapped[i] for i in self.student_layers(student))

    def make_extra(self, student: Any) -> nn.Module | None:
        width, wide = student.config.width, self.teacher.config.width
        if width == wide:
            return None
        maps = nn.ModuleDict({str(i): nn.Linear(width, wide, bias=False) for i in self.student_layers(student)})
        generator = torch.Generator().manual_seed(0)
        for layer in maps.values():
            nn.init.normal_(cast(Tensor, layer.weight), std=width**-0.5, generator=generator)
        return maps

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        pairs = list(zip(self.student_layers(student), self.teacher_layers(student), strict=True))
        total = torch.zeros((), device=mask_BT.device)
        for i, j in pairs:
            x_BTD = seen.layers[i].float()
            if self.extra is not None:
                x_BTD = self.extra.get_submodule(str(i))(x_BTD)
            total = total + square_sum(x_BTD, taught.layers[j], mask_BT)
        return {"feature": self.config.weight / len(pairs) * total}
