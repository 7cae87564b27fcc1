"""meco: next-token prediction on text that is told where it comes from.

This is the loss; `transform/meco`, which it brings along, puts each document's source before its text until near
the end of the run (`transform=meco:cooldown=0.1`) and masks it from the loss. So the loss is next-token's:

    loss = - sum over t_1 ... t_n, eos of log p(token | all before it in its document, its metadata first)

Documents must not see each other: packing concat:mask=true. Metadata takes space in the rows, and the text it displaces
comes in the next, so a step costs what it did.

Gao et al. 2025, arXiv:2501.01956, section 2. Departs from the paper: see the transform; the optimizer and the rate
go on through the cool-down as they do there, and so does the order of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from modicum.core.errors import UserError
from modicum.train.loss import token_loss
from modicum.train.objectives import Loss, Objective, Step

BRINGS = ("transform/meco",)
CLAIM = {
    "figure": "the same task scores with 33% fewer tokens",
    "where": "table 1",
    "scale": "1.6B parameters, 160B tokens of DCLM",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    logits_bytes: int | None = None  # bound on the float32 logits that exist at once; None: what runs fast

    def __post_init__(self) -> None:
        if self.logits_bytes is not None and self.logits_bytes < 1:
            raise ValueError(f"logits_bytes={self.logits_bytes} must be positive")


class MeCo(Objective):
    config: Config
    requires = frozenset({"document_mask"})

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        if batch.documents_BT is None:
            raise UserError(
                "objective 'meco' needs documents that do not see each other, and the batch says nothing of "
                "documents; choose packing concat:mask=true"
            )
        total, count = token_loss(model, batch, logits_bytes=self.config.logits_bytes)
        return Loss(total, count)
