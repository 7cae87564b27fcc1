"""Reference tests of the first optimizers and schedules: the papers' equations, computed naively."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.train.precision import Masters


def _schedule(choice: str):
    return registry.build("schedule", choice)


def _adamw_naive(w, grads, lr, decay, b1=0.9, b2=0.95, eps=1e-8):
    """Algorithm 2 of arXiv:1711.05101 in float64, decay multiplied by the rate."""
    w = w.double()
    m = v = torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        g = g.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * decay * w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    return w


def test_adamw_follows_its_equation():
    generator = torch.Generator().manual_seed(0)
    named = {
        n: nn.Parameter(torch.randn(s, generator=generator))
        for n, s in (("layers.0.q.weight", (5, 4)), ("norm.weight", (7,)), ("embed.weight", (6, 3)))
    }
    start = {n: p.detach().clone() for n, p in named.items()}
    optimizer = registry.build("optimizer", "adamw:weight_decay=0.3", list(named.items()), lr=0.02)
    grads = {n: [torch.randn(p.shape, generator=generator) for _ in range(6)] for n, p in named.items()}
    for i in range(6):
        for n, p in named.items():
            p.grad = grads[n][i].clone()
        optimizer.step({"lr": 0.5})
    for n, p in named.items():
        decay = 0.3 if n == "layers.0.q.weight" else 0.0  # matrices alone
        assert torch.allclose(p.double(), _adamw_naive(start[n], grads[n], 0.01, decay), atol=1e-6), n


def test_masters_keep_updates_that_bf16_would_lose():
    low = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    masters = Masters({"w": low})
    optimizer = registry.build("optimizer", "adamw:weight_decay=0", masters.named.items(), lr=1e-4)
    for _ in range(100):  # each update is a thirtieth of bf16's spacing at 1
        for _ in range(2):  # two micro-batches, summed in float32
            (low * 1.5).sum().backward()
        assert low.grad is None and torch.equal(masters.named["w"].grad, torch.full((8,), 3.0))
        optimizer.step({"lr": 1.0})
        masters.write_back()
        masters.named["w"].grad = None
    assert torch.allclose(masters.named["w"], torch.full((8,), 0.99), atol=1e-4)
    assert torch.equal(low, masters.named["w"].bfloat16())


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        registry.build("optimizer", "adamw", [])


def test_cosine_values():
    schedule = _schedule("cosine:warmup=0.1,floor=0.1")
    for done, expected in (
        (0, 0.0),
        (50, 0.5),
        (100, 1.0),
        (550, 0.55),
        (1000, 0.1),
        (325, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),
    ):
        assert schedule.scale(done, 1000)["lr"] == pytest.approx(expected)


def test_wsd_values():
    schedule = _schedule("wsd:warmup=100,decay=0.2,floor=0.5,shape=linear")  # warm-up in tokens
    for done, expected in ((25, 0.25), (100, 1.0), (800, 1.0), (900, 0.75), (1000, 0.5)):
        assert schedule.scale(done, 1000)["lr"] == pytest.approx(expected)
    assert _schedule("wsd").scale(850, 1000)["lr"] == pytest.approx(1 - math.sqrt(0.25))


def test_constant_does_not_know_the_horizon():
    schedule = _schedule("constant:warmup=64")
    assert [schedule.scale(d, t)["lr"] for d in (32, 64, 500) for t in (10**3, 10**6)] == [
        0.5,
        0.5,
        1,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize("choice", ["cosine:floor=2", "cosine:warmup=-1", "wsd:decay=1.5", "wsd:shape=cubic"])
def test_knobs_out_of_range_are_refused(choice):
    with pytest.raises(UserError, match=r"schedule/"):
        _schedule(choice)


@pytest.mark.parametrize("choice", ["adamw:beta1=1", "adamw:eps=0", "adamw:weight_decay=-1", "adamw:betas=1"])
def test_optimizer_knobs_out_of_range_are_refused(choice):
    with pytest.raises(UserError, match="optimizer/adamw"):
        registry.build("optimizer", choice, [("w", nn.Parameter(torch.ones(2)))])
