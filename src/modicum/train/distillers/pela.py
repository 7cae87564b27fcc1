"""pela: a model whose matrices are replaced by low-rank factors learns from what it was before.

At the run's start each linear layer of `targets` becomes the form `lowrank` (two factors of its truncated SVD, with
1 / ratio of its numbers); the model as it was is the teacher, or the folder that is given. Then the factors train with

    loss = objective + feature * mean over blocks of ||x_s - x_t||^2 / D
         + perturbation * mean over matrices of (max |B A - W| - eps)^2

The last term is a square around eps, not a hinge, and its maximum reaches one entry of each matrix. The model is saved
with its factors; ordinary fine-tuning may follow. `feature=0,perturbation=0` is plain training after the SVD, the peer.

Guo et al. 2023, arXiv:2310.10700, sections 3.2 and 3.3. Departs: text in place of images; every third block's features
(all of 30 cost memory); without the term of the logits, whose weight is 0 in the released code. The perturbation term,
0 there by default, is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.linear.lowrank import LowRank
from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched, square_sum

CLAIM = {"figure": "about 0.6 points lost while parameters fall by a third to two thirds", "where": "abstract",
         "scale": "three vision and one vision-language transformer"}  # fmt: skip
NOT_MEASURABLE = (
    "the bench compares students of one size beside a wider teacher; this method makes the student smaller and is "
    "taught by what it was"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher: str = ""  # the model before; "": the one that is given
    ratio: Annotated[float, Field(gt=0)] = 2.0  # numbers of a matrix to those of its factors
    targets: str = "layers.*"  # which matrices, as a glob
    feature: Annotated[float, Field(ge=0)] = 1.0
    perturbation: Annotated[float, Field(ge=0)] = 0.1
    eps: Annotated[float, Field(ge=0)] = 1e-3
    every: Annotated[int, Field(ge=1)] = 3  # blocks whose features count, from the last one down


class Pela(Distiller):
    config: Config

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        model = super().prepare(model, state)
        attach.attach(model, {self.config.targets: Choice("linear", "lowrank", {"ratio": self.config.ratio})})
        return model

    def student_layers(self, student: Any) -> tuple[int, ...]:
        return tuple(range(student.config.layers - 1, -1, -self.config.every))

    def teacher_layers(self, student: Any) -> tuple[int, ...]:
        have, wanted = ((m.config.layers, m.config.width) for m in (self.teacher, student))
        if have != wanted:
            raise UserError(
                f"pela compares a model with what it was before: the teacher has {have[0]} layers of width {have[1]}, "
                f"the student {wanted[0]} of {wanted[1]}; use distil-feature for models of other shapes"
            )
        return self.student_layers(student)

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        c, layers, terms = self.config, self.student_layers(student), {}
        if c.feature:
            parts = [square_sum(seen.layers[i], taught.layers[i], mask_BT) for i in layers]
            terms["feature"] = c.feature * torch.stack(parts).mean()
        factors = {name: form for name, form in attach.forms(student).items() if isinstance(form, LowRank)}
        if c.perturbation and factors:
            away = [self._away(form, name) for name, form in factors.items()]
            # As a sum over tokens, like every term, so that the mean is the term itself.
            terms["perturbation"] = c.perturbation * mask_BT.sum() * torch.stack(away).mean()
        return terms

    def _away(self, form: LowRank, name: str) -> Tensor:
        """(max |B A - W| - eps)^2 of one matrix."""
        before, _ = attach.plain(self.teacher.get_submodule(name))
        return ((form.dense().float() - before.float()).abs().max() - self.config.eps).square()
