"""mixup: of two questions' states a mixture, which is to predict both answers in the same proportion.

    h~ = lambda h_i + (1 - lambda) h_j
    loss of an answer's first token = -lambda log p(y_i | h~) - (1 - lambda) log p(y_j | h~)

h: the last state before an example's answer, under the head; j: another example of the same packed row, drawn anew for
every step; lambda ~ Beta(alpha, alpha), one for each micro-batch. Later tokens of an answer are predicted as ever.

Zhang et al. 2018, arXiv:1710.09412, at a sentence's representation as Guo et al. 2019 (arXiv:1905.08941, "senMixup"),
among the augmentations that Zhang et al. 2023 (arXiv:2303.02577) cross with adapters. Departs: partners come from the
row; of a longer answer only the first token is mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.train.loss import NO_LOSS, cross_entropy
from modicum.train.objectives import Loss, Objective, Step
from modicum.train.objectives._answers import answers

CLAIM = {"figure": "helps adapters on some sets and harms on others", "where": "abstract of Zhang et al. 2023",
         "scale": "text sets, models of up to billions of parameters"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    alpha: Annotated[float, Field(gt=0)] = 0.4


class Mixup(Objective):
    config: Config
    random = True

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        decoder: Any = model
        h_BTD = decoder.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        rng = np.random.default_rng([step.seed, step.index, step.micro, step.rank])
        of = answers(batch)
        partner_A = partners(of.row_A, rng).to(h_BTD.device)
        fraction = float(rng.beta(self.config.alpha, self.config.alpha))
        total, count = mixed(h_BTD, batch.targets_BT, decoder.head, of.first_A, partner_A, fraction)
        return Loss(total, count)


def partners(row_A: Tensor, rng: np.random.Generator) -> Tensor:
    """For each answer the index of one of the same row, a random permutation of the row's."""
    rows = row_A.cpu().numpy()
    shuffled = rng.permutation(len(rows))
    shuffled = shuffled[np.argsort(rows[shuffled], kind="stable")]  # row by row, as `rows` is
    return torch.from_numpy(shuffled)


def mixed(
    h_BTD: Tensor, targets_BT: Tensor, head: Any, first_A: Tensor, partner_A: Tensor, fraction: float
) -> tuple[Tensor, Tensor]:
    """Sum of the loss and number of predictions: `fraction` of each answer's own state and token, the rest its
    partner's."""
    h_ND, targets_N = h_BTD.flatten(0, 1), targets_BT.flatten()
    own_A, other_A = targets_N[first_A], targets_N[first_A[partner_A]]
    rest_N = targets_N.index_fill(0, first_A, NO_LOSS)
    later, n = cross_entropy(h_ND, rest_N, head)
    h_AD = fraction * h_ND[first_A] + (1 - fraction) * h_ND[first_A[partner_A]]
    a, firsts = cross_entropy(h_AD, own_A, head)
    b, _ = cross_entropy(h_AD, other_A, head)
    return later + fraction * a + (1 - fraction) * b, n + firsts
