"""distil-logit: the student's next-token distribution is drawn to the teacher's.

    loss = (1 - alpha) (- log p_s[target]) + alpha T^2 KL(p_t || p_s),     p = softmax(logits / T)

summed over all tokens that carry loss. T^2 keeps the size of the gradient; as T grows the term tends to the squared
difference of the centred logits over 2 V. `reverse` takes KL(p_s || p_t), which looks for one of the teacher's modes;
`top` lets only the teacher's likeliest tokens count, renormalised, and reports the probability that they have
(`teacher_mass`, a sum as all metrics). Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2. Departs: alpha weighs
both terms, the paper adds them with a weight on the hard one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched, divergence_N, predictions_sum


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher: str = ""  # model folder or name; "": the model as the run begins
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5  # weight of the teacher's term
    temperature: Annotated[float, Field(gt=0)] = 1.0
    reverse: bool = False  # KL(student || teacher)
    top: Annotated[int, Field(ge=0)] = 0  # the teacher's likeliest tokens alone; 0: all


class DistilLogit(Distiller):
    config: Config

    @property
    def keep(self) -> float:
        return 1.0 - self.config.alpha

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        c, masses = self.config, []

        def of(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
            if c.top:
                p_NV = torch.softmax(teacher_NV.float() / c.temperature, -1)
                masses.append(p_NV.topk(min(c.top, p_NV.shape[-1]), -1)[0].sum(-1))
            return c.alpha * divergence_N(student_NV, teacher_NV, c.temperature, reverse=c.reverse, top=c.top)

        terms = {"distil": predictions_sum(student, self.teacher, seen.h_BTD, taught.h_BTD, mask_BT, of)}
        self._mass = (torch.cat(masses) * mask_BT.flatten()).sum() if masses else None
        return terms

    def loss(self, objective: Any, model: Any, batch: Any, step: Any) -> Any:
        made = super().loss(objective, model, batch, step)
        if self._mass is not None:
            made.metrics["teacher_mass"] = self._mass
        return made
