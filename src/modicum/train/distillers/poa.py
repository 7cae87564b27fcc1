"""poa: the student and a smaller student within it learn from an average of the student.

At every micro-batch an elastic sub-model is drawn, `depth` of the layers at even spacing and the first `width` of each
layer's key/value groups and MLP channels, which shares the student's weights. With p_e an exponential average of the
student's weights (the teacher), p_s the student, p_i the elastic one, and KL over next tokens

    loss = objective + weight (a KL(p_e || p_s) + (1 - a) (KL(p_e || p_i) + KL(p_s || p_i)))
    theta_e <- m theta_e + (1 - m) theta_s     after every step

no gradient through the first argument. After training, sub-models of many sizes are taken out:
`modicum compress RUN/model --with sortednet`. Zhang et al. 2024, arXiv:2408.01031, section 3 (Pre-training Once for
All; from summaries). Departs: text in place of images, so predictions of the next token in place of prototypes, and one
view in place of two: the objective, which the paper has not, keeps the student from collapsing. The width of the
residual stream is not cut; norms are shared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.model.submodel import Submodel, hidden, sort_by_importance
from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched, divergence_N, frozen_copy, predictions_sum

CLAIM = {"figure": "about a hundred models of one run, each as good as if trained alone", "where": "abstract",
         "scale": "ViT, Swin and ResNet on ImageNet"}  # fmt: skip
NOT_MEASURABLE = "the bench asks what the whole student gains of a wider teacher; this method is for its sub-models"


@dataclass(frozen=True, kw_only=True)
class Config:
    depth: Annotated[float, Field(gt=0, le=1)] = 0.5  # least depth of an elastic sub-model, as a fraction
    width: Annotated[float, Field(gt=0, le=1)] = 0.5  # least width
    weight: Annotated[float, Field(ge=0)] = 1.0  # of all three divergences
    whole: Annotated[float, Field(ge=0, le=1)] = 0.8  # a: weight of the whole student's among them
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99  # m


class Poa(Distiller):
    config: Config
    conflicts = frozenset({"fsdp", "objective/ul2", "linear"})

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        decoder: Any = model
        sort_by_importance(decoder)
        return model

    def ready(self, student: Any) -> None:
        if self.teacher is None:
            self.teacher = frozen_copy(student)
            for name, p in self.teacher.named_parameters():
                if f"average.{name}" in self._saved:
                    p.data.copy_(self._saved[f"average.{name}"])

    def loss(self, objective: Any, model: Any, batch: Any, step: Any) -> Any:
        random = Random(f"{step.seed}/{step.index}/{step.micro}/{step.rank}")
        self._elastic = draw(model.config, self.config, random)
        return super().loss(objective, model, batch, step)

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        c = self.config
        small_BTD = hidden(student, self._elastic, seen.tokens_BT, **seen.options)
        same_BTD = seen.h_BTD.detach()

        def divergence(teacher: Any, h_BTD: Tensor, target_BTD: Tensor) -> Tensor:
            return predictions_sum(student, teacher, h_BTD, target_BTD, mask_BT, divergence_N)

        whole = divergence(self.teacher, seen.h_BTD, taught.h_BTD)
        elastic = divergence(self.teacher, small_BTD, taught.h_BTD) + divergence(student, small_BTD, same_BTD)
        return {"whole": c.weight * c.whole * whole, "elastic": c.weight * (1 - c.whole) * elastic}

    @torch.no_grad()
    def after_step(self, trainer: Any) -> None:
        for average, p in zip(self.teacher.parameters(), trainer.model.parameters(), strict=True):
            average.lerp_(p.to(average.dtype), 1 - self.config.momentum)

    def state_dict(self) -> dict[str, Any]:
        return {f"average.{name}": copy.copy(p.detach()) for name, p in self.teacher.named_parameters()}


def draw(shape: Any, config: Config, random: Random) -> Submodel:
    """Depth and width, each uniform from its least value to all; layers at even spacing, the first one among them."""
    least = max(1, round(config.depth * shape.layers))
    depth = random.randint(least, shape.layers)
    width = config.width + (1 - config.width) * random.random()
    return Submodel.of(shape, [i * shape.layers // depth for i in range(depth)], width, width)
