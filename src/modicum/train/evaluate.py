"""Held-out loss: the mean negative log-likelihood per target, in nats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from modicum.core.errors import UserError
from modicum.data.stream import NO_LOSS, Batch, EndOfData
from modicum.train.objectives import Objective, Step
from modicum.train.objectives.next_token import Config, NextToken
from modicum.train.parallel import Ranks, Whole


def batches_of(source: Any, rows: int, sequences: int | None = None) -> Iterator[Batch]:
    """Batches of a stream, or those given. A stream is read from where it is and then set back there."""
    if not hasattr(source, "next_batch"):
        yield from source
        return
    start, remaining = source.state(), sequences
    try:
        while remaining is None or remaining > 0:
            try:
                batch = source.next_batch(rows if remaining is None else min(rows, remaining))
            except EndOfData:
                return
            remaining = None if remaining is None else remaining - len(batch)
            yield batch
    finally:
        source.load_state(start)


def mean_loss(
    model: nn.Module,
    source: Any,
    *,
    rows: int = 8,
    sequences: int | None = None,
    device: str | torch.device | None = None,
) -> float:
    """Mean next-token loss of `model` over a stream or an iterable of batches.

    rows: sequences of one forward pass; sequences: how many to read of a stream (None: until it ends).
    """
    where = torch.device(device) if device is not None else next(model.parameters()).device
    return whole_loss(Whole(model), batches_of(source, rows, sequences), where)


def whole_loss(
    whole: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    ranks: Ranks | None = None,
    objective: Objective | None = None,
) -> float:
    """As `mean_loss`, for the loop: on every process, each with its rows of every batch."""
    ranks, objective = ranks or Ranks(), objective or NextToken(Config())
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    training = whole.training
    whole.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                part = _filled(batch, ranks.world).rows(ranks.rank, ranks.world).to(device)
                total, count, _ = whole(objective, part, Step())
                sums += torch.stack([total.double(), count.double()])
    finally:
        whole.train(training)
    loss, targets = ranks.sum(sums).tolist()
    if not targets:
        raise UserError("the held-out data has no target to predict; give more of it")
    return loss / targets


def _filled(batch: Batch, world: int) -> Batch:
    """With rows that carry no loss added, so that every process has as many."""
    missing = -len(batch) % world
    if not missing:
        return batch

    full = batch.map(lambda x: torch.cat([x, x[:1].expand(missing, -1)]))
    full.targets_BT[len(batch) :] = NO_LOSS
    return full
