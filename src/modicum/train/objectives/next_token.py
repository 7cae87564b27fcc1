"""next-token: predict each token from those before it.

The sum of the negative log-likelihoods of all targets that carry loss (targets_BT != -100). The
logits exist for a slice of the sequence at a time, so that a large vocabulary does not decide the memory.

    loss = - sum over b, t of log softmax(head(h[b, t]))[target[b, t]]

Bengio et al. 2003, A Neural Probabilistic Language Model, JMLR 3, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from modicum.train.loss import token_loss
from modicum.train.objectives import Loss, Objective, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    logits_bytes: int | None = None  # bound on the float32 logits that exist at once; None: what runs fast

    def __post_init__(self) -> None:
        if self.logits_bytes is not None and self.logits_bytes < 1:
            raise ValueError(f"logits_bytes={self.logits_bytes} must be positive")


class NextToken(Objective):
    config: Config

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        total, count = token_loss(model, batch, logits_bytes=self.config.logits_bytes)
        return Loss(total, count)
