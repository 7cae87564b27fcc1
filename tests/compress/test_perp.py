"""perp as a compressor: the objective in float64, zeros that stay, and less lost than by the base."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from modicum.compress.compressors import Statistics
from modicum.compress.compressors.perp import Config, reconstruct
from modicum.core import registry


def matrix(rows: int = 24, columns: int = 32) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def inputs(rows: int = 200, columns: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 8, dtype=torch.float64, generator=generator) @ torch.randn(
        8, columns, dtype=torch.float64, generator=generator
    )
    return x + 0.2 * torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def lost(weight, made, x):
    return float((linear(x, made) - linear(x, weight)).square().sum())


@pytest.mark.parametrize("base", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("knobs", ["sparsity=0.6", "pattern=2of4"])
def test_zeros_stay_and_less_is_lost(base, knobs):
    weight, x = matrix(), inputs()
    statistics = Statistics.of(x)
    pruned = registry.build("compressor", f"{base}:{knobs}").fit(weight, statistics)
    made = registry.build("compressor", f"perp:base={base},{knobs},rank=4,steps=60,rate=0.02").fit(weight, statistics)
    assert torch.equal(made == 0, pruned == 0), "the mask moved"
    assert lost(weight, made, x) < 0.97 * lost(weight, pruned, x)
    same = registry.build("compressor", f"perp:base={base},{knobs},steps=0").fit(weight, statistics)
    assert torch.equal(same, pruned), "no step changes nothing"


def test_steps_are_those_of_autograd():
    """The written-out gradient against torch's, through the mask and the scale."""
    weight, x = matrix(), inputs()
    pruned = registry.build("compressor", "magnitude:sparsity=0.5").fit(weight, Statistics.of(x))
    config = Config(rank=3, alpha=6.0, steps=4, rate=0.01)
    gram = x.T @ x / len(x)
    made = reconstruct(weight, pruned, gram, config)
    generator = torch.Generator().manual_seed(0)
    A = ((torch.rand(3, 32, generator=generator) * 2 - 1) / 32**0.5).double().requires_grad_()
    B = torch.zeros(24, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([A, B], lr=0.01, weight_decay=0.0)
    live = pruned != 0
    first = lost(weight, pruned, x) / len(x)
    for step in range(4):
        now = pruned + 2.0 * (B @ A) * live
        (((now - weight) @ x.T).square().sum() / len(x) / first).backward()
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 4)
        optimizer.step()
        optimizer.zero_grad()
    wanted = (pruned + 2.0 * (B @ A) * live).detach()
    assert lost(weight, wanted, x) < lost(weight, pruned, x)
    torch.testing.assert_close(made, wanted, atol=1e-7, rtol=1e-7)
