"""supcon: next-token prediction, and states of questions with the same answer drawn together, others apart.

    loss = next-token's + weight * sum over i of c_i
    c_i  = -1/|P(i)| sum over p in P(i) of log( e^(s_ip / t) / sum over a != i of e^(s_ia / t) )

i: an example; s: cosine of the states that predict the first token of two answers, which have read the questions; P(i):
the other examples with i's answer; t: temperature. An example without such company has no term. Examples are compared
within a packed row, so the gradient does not depend on micro-batches: pack short examples into long rows, so that a
class meets itself (`modicum adapt` does by default).

Khosla et al. 2020, "Supervised contrastive learning" (arXiv:2004.11362), equation 2, in the role it has beside adapters
and augmentation in Zhang et al. 2023 (arXiv:2303.02577): `rewrite/peft-augmentation` makes the copies. Departs: a class
is an answer's text; no projection head; the company is the row, not the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.train.loss import cross_entropy
from modicum.train.objectives import Loss, Objective, Step
from modicum.train.objectives._answers import Answers, answers

CLAIM = {"figure": "the contrastive term mends what augmentation costs adapters and prefixes", "where": "abstract",
         "scale": "text sets, Zhang et al. 2023"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    weight: Annotated[float, Field(ge=0)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 0.1


class SupCon(Objective):
    config: Config

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        decoder: Any = model
        h_BTD = decoder.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        total, count = cross_entropy(h_BTD, batch.targets_BT, decoder.head)
        of = answers(batch)
        term, anchors = contrast(h_BTD.flatten(0, 1)[of.first_A], of, self.config.temperature)
        return Loss(total + self.config.weight * term, count, {"contrast": term.detach(), "anchors": anchors})


def contrast(h_AD: Tensor, of: Answers, temperature: float) -> tuple[Tensor, Tensor]:
    """The sum of the contrastive terms, and how many examples have one; float32."""
    z_AD = F.normalize(h_AD.float(), dim=-1)
    others_AA = (of.row_A[:, None] == of.row_A) & ~torch.eye(len(of.row_A), dtype=torch.bool, device=h_AD.device)
    alike_AA = others_AA & (of.label_A[:, None] == of.label_A)
    s_AA = (z_AD @ z_AD.T / temperature).masked_fill(~others_AA, -1e30)
    log_AA = s_AA - s_AA.logsumexp(1, keepdim=True)
    company_A = alike_AA.sum(1)
    each_A = -log_AA.masked_fill(~alike_AA, 0.0).sum(1) / company_A.clamp_min(1)
    return each_A.sum(), (company_A > 0).sum()
