"""What must hold for any objective, on a decoder of a few thousand parameters."""

from __future__ import annotations

from typing import Any

import torch

from modicum.core import registry
from modicum.data.stream import Batch
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.objectives import Objective, Step


def _make(key: str) -> Objective:
    loaded = registry.load("objective", key)
    return loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())


def _model() -> Decoder:
    return Decoder(llama_like(61, 32, 2), torch.Generator().manual_seed(0))


def _batch(rows: int = 6, length: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 61, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 5:] = -100
    targets[3, :2] = -100
    documents = (torch.arange(length)[None] >= torch.arange(3, 3 + rows)[:, None]).long()
    positions = torch.arange(length).expand(rows, length).clone()
    return Batch(tokens[:, :-1].contiguous(), targets, documents, positions)


def _gradient(key: str, cuts: list[slice], step: Step) -> tuple[float, float, torch.Tensor]:
    model, objective, batch = _model(), _make(key), _batch()
    total = count = 0.0
    for cut in cuts:
        loss = objective.loss(model, batch.slice(cut.start, cut.stop), step)
        loss.total.backward()
        total, count = total + float(loss.total.detach()), count + float(loss.count)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return total, count, flat / count


def check_sum_and_count(key: str) -> None:
    """`total` is a finite float32 scalar with a graph, `count` is positive, metrics are scalars."""
    objective = _make(key)
    loss = objective.loss(_model(), _batch(), Step())
    assert loss.total.ndim == 0 and loss.total.dtype == torch.float32 and loss.total.requires_grad, (
        f"{key}: total must be a float32 scalar with a graph"
    )
    assert torch.isfinite(loss.total), f"{key}: total={loss.total}"
    assert float(loss.count) > 0, f"{key}: count={loss.count}"
    assert all(torch.as_tensor(m).ndim == 0 for m in loss.metrics.values()), f"{key}: metrics must be scalars"


def check_repeats(key: str) -> None:
    """The same step gives the same loss and gradient bit for bit, whatever was drawn before."""
    torch.manual_seed(0)
    first = _gradient(key, [slice(0, 6)], Step(index=3, seed=1))
    torch.manual_seed(1)
    second = _gradient(key, [slice(0, 6)], Step(index=3, seed=1))
    assert first[0] == second[0] and torch.equal(first[2], second[2]), f"{key}: the loss is not repeatable"


def check_reaches_every_weight(key: str) -> None:
    """The gradient is finite, and the head, the embedding and every layer get some."""
    model = _model()
    _make(key).loss(model, _batch(), Step()).total.backward()
    for name, p in model.named_parameters():
        grad: Any = p.grad
        assert grad is not None and torch.isfinite(grad).all(), f"{key}: {name} has no finite gradient"


def check_learns(key: str) -> None:
    """Thirty steps on one batch lower the loss."""
    model, objective, batch = _model(), _make(key), _batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = objective.loss(model, batch, Step())
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach() / loss.count))
    assert losses[-1] < 0.9 * losses[0], f"{key}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"


def check_accumulates(key: str) -> None:
    """Unless it draws random numbers, a method gives the same mean gradient however the batch is cut."""
    if _make(key).random:
        return
    whole = _gradient(key, [slice(0, 6)], Step())
    parts = _gradient(key, [slice(0, 1), slice(1, 4), slice(4, 6)], Step())
    assert abs(whole[0] / whole[1] - parts[0] / parts[1]) < 1e-5, f"{key}: the mean loss depends on the cut"
    assert torch.allclose(whole[2], parts[2], atol=1e-6), f"{key}: the gradient depends on the cut"
