"""document-losses: next-token prediction that remembers the mean loss of every document it reads.

    loss    = next-token's
    mean(d) = mean over the step's tokens t of d of -log p(t | what came before)      to the order, after the step

It stands between the batch, whose tokens carry their document's number (`transform/document-number`), and an order that
chooses by losses (`seta`), and keeps the order's scores in checkpoints. The head is evaluated once more, without
gradients, to have the losses by token.

The measurement behind Zhou et al. 2025, arXiv:2503.13385, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.train.loss import NO_LOSS, cross_entropy, slice_rows
from modicum.train.objectives import Loss, Objective, Step

NOT_MEASURABLE = "its loss is next-token's; what an order makes of the losses is the order's to show"


@dataclass(frozen=True, kw_only=True)
class Config:
    logits_bytes: int | None = None  # bound on the float32 logits that exist at once; None: what runs fast

    def __post_init__(self) -> None:
        if self.logits_bytes is not None and self.logits_bytes < 1:
            raise ValueError(f"logits_bytes={self.logits_bytes} must be positive")


class DocumentLosses(Objective):
    config: Config
    conflicts = frozenset({"fsdp"})  # each process would see the losses of its own rows alone

    def __init__(self, config: Config):
        super().__init__(config)
        self.order: Any = None
        self.saved: dict[str, Any] = {}
        self.sums: dict[int, list[float]] = {}  # by document: summed loss and tokens of this step

    def start(self, trainer: Any) -> None:
        stream = getattr(trainer, "stream", None)
        if stream is None:  # a plan's, which has steps and no data
            return
        self.order = getattr(getattr(stream, "sampler", None), "order", None)
        if not hasattr(self.order, "observe"):
            raise UserError("objective 'document-losses' serves an order that chooses by losses; choose order seta")
        if self.saved:
            self.order.load_state({name: value.numpy() for name, value in self.saved.items()})

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        decoder: Any = model
        h_BTD = decoder.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        total, count = cross_entropy(h_BTD, batch.targets_BT, decoder.head, self.config.logits_bytes)
        numbers_BT = batch.extras.get("document")
        if numbers_BT is not None:
            losses_N = token_losses(h_BTD.detach(), batch.targets_BT, decoder.head, self.config.logits_bytes)
            self._add(numbers_BT.flatten().long(), losses_N, batch.targets_BT.flatten() != NO_LOSS)
        return Loss(total, count)

    def _add(self, numbers_N: Tensor, losses_N: Tensor, learnt_N: Tensor) -> None:
        learnt_N = learnt_N & (numbers_N > 0)
        documents, position = torch.unique(numbers_N[learnt_N], return_inverse=True)
        sums = torch.zeros(len(documents), dtype=torch.float64).index_add_(
            0, position.cpu(), losses_N[learnt_N].double().cpu()
        )
        counts = torch.bincount(position.cpu(), minlength=len(documents))
        for number, value, n in zip(documents.tolist(), sums.tolist(), counts.tolist(), strict=True):
            total = self.sums.setdefault(number - 1, [0.0, 0.0])
            total[0], total[1] = total[0] + value, total[1] + n

    def after_step(self, trainer: Any) -> None:
        if self.sums and self.order is not None:
            numbers = np.array([*self.sums], np.int64)
            self.order.observe(numbers, np.array([s / n for s, n in self.sums.values()]))
        self.sums = {}

    def state_dict(self) -> dict[str, Any]:
        state = self.order.state() if self.order is not None else {}
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = dict(state)


@torch.no_grad()
def token_losses(h_BTD: Tensor, targets_BT: Tensor, head: Any, logits_bytes: int | None) -> Tensor:
    """float32 [B T]: -log p of each target; 0 where there is none."""
    h_ND, targets_N = h_BTD.flatten(0, -2), targets_BT.flatten()
    rows = slice_rows(head(h_ND[:1]).shape[-1], h_ND.device, logits_bytes)
    losses = [
        torch.nn.functional.cross_entropy(head(h).float(), t, ignore_index=NO_LOSS, reduction="none")
        for h, t in zip(h_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.cat(losses)
