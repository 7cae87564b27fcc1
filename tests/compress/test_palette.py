"""Tables of values: k-means against brute force, NormalFloat, and edkm against naive autograd."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from modicum.compress.compressors import Statistics
from modicum.compress.compressors.edkm import VALUES, Clustering, Config, _Clustered, assign, histogram
from modicum.compress.compressors.kmeans import Config as MeansConfig
from modicum.compress.compressors.kmeans import KMeans
from modicum.model.linear import LinearShape, palette
from modicum.model.linear.palette import Palette, means, nearest, normal_float

NOTHING = Statistics(frozenset())


def values(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_means_are_a_fixed_point_and_near_the_best() -> None:
    x = values(12)
    made = means(x, 3)
    owners = (x[:, None] - made).abs().argmin(1)
    torch.testing.assert_close(made, torch.stack([x[owners == k].mean() for k in range(3)]))
    ordered = x.sort().values
    best = min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(ordered.numpy(), list(cuts)))
        for cuts in itertools.combinations(range(1, 12), 2)
    )
    assert float((x - made[owners]).square().sum()) <= 1.3 * best
    heavy = torch.where(x == x.max(), 1e6, 1.0)
    assert float(means(x, 3, heavy).max()) == pytest.approx(float(x.max()), rel=1e-3)


def test_nearest_takes_any_order_of_the_table() -> None:
    x, table = values(200), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    assert torch.equal(nearest(x, table).long(), (x[:, None] - table).abs().argmin(1))


def test_normal_float_is_the_known_table() -> None:
    known = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    known += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert normal_float(4) == pytest.approx(known, abs=2e-6)
    assert normal_float(2) == pytest.approx((-1, 0, 0.3379, 1), abs=1e-3)


@pytest.mark.parametrize("config", [{"bits": 3}, {"bits": 2, "rows": 3}, {"bits": 4, "table": "normal", "group": 16}])
def test_rows_and_bytes_of_the_form(config: dict[str, Any]) -> None:
    weight = values(8 * 40).view(8, 40).float()
    form = Palette(palette.Config(**config, scale_dtype="float32"), LinearShape.of(weight, None)).fit(weight)
    index = torch.tensor([[5, 0], [7, 7]])
    assert torch.equal(form.rows(index), form.dense()[index])
    scales = 8 * 3 * 4 if config.get("table") else 4 * 2 ** config["bits"] * (3 if config.get("rows") else 1)
    assert form.nbytes() == 8 * 40 * config["bits"] // 8 + scales
    error = float((form.dense() - weight).norm() / weight.norm())
    assert error < {2: 0.4, 3: 0.2, 4: 0.12}[config["bits"]]


def test_kmeans_stores_the_means_of_what_is_nearest() -> None:
    weight = values(24 * 16).view(24, 16).float()
    made = KMeans(MeansConfig(bits=2, rows=8, scale_dtype="float32")).fit(weight, NOTHING)
    assert made.tables_RK.shape == (3, 4)
    for part, codes, table in zip(weight.split(8), made.codes_OI.split(8), made.tables_RK, strict=True):
        assert torch.equal(codes.long(), (part[..., None] - table).abs().argmin(-1))
    form = made.form(torch.nn.Linear(16, 24, bias=False), torch.float32)
    assert torch.equal(form.dense(), made.weight())
    uniform = Palette(palette.Config(bits=2, scale_dtype="float32"), LinearShape.of(weight, None)).fit(weight)
    assert (made.weight() - weight).norm() < (uniform.dense() - weight).norm()


def naive(weight: torch.Tensor, table: torch.Tensor, tau: float, rounds: int) -> torch.Tensor:
    """DKM as published, with a row for every weight."""
    w = weight.flatten()
    for _ in range(rounds):
        a = (-(w[:, None] - table).square() / tau).softmax(-1)
        table = (a * w[:, None]).sum(0) / a.sum(0)
    return (a @ table).view(weight.shape)


@pytest.mark.parametrize("rounds", [1, 3])
def test_edkm_is_dkm_with_a_row_for_each_value(rounds: int) -> None:
    """Values and gradients against autograd over all weights, in which many have the same value."""
    weight = (values(300) * 0.05).bfloat16().double().view(15, 20)
    weight[3] = weight[4]
    table, tau = torch.linspace(-0.1, 0.1, 8, dtype=torch.float64), 4e-4
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    made, _ = _Clustered.apply(ours, table, tau, rounds, 0.0)
    want = naive(theirs, table, tau, rounds)
    torch.testing.assert_close(made, want, atol=1e-6, rtol=1e-5)
    grad = values(300, 1).view(15, 20)
    made.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=2e-4)
    assert float((theirs.grad[3] - theirs.grad[4]).abs().max()) > 0.01  # type: ignore[index]


def test_edkm_keeps_the_weight_in_two_bytes_and_small_tables() -> None:
    weight = torch.nn.Parameter(values(512 * 512).view(512, 512).float() * 0.05)
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _Clustered.apply(weight, torch.linspace(-0.1, 0.1, 8), 1e-4, 3, 0.0)
        ours, kept[:] = sum(t.nbytes for t in kept), []
        naive(weight, torch.linspace(-0.1, 0.1, 8), 1e-4, 3)
        theirs = sum(t.nbytes for t in kept)
    assert ours <= 2 * weight.numel() + VALUES * 8 * 4 and theirs > 20 * ours


def test_edkm_trains_softly_and_stores_the_nearest_entries() -> None:
    clustering = Clustering(values(16 * 24).view(16, 24).float() * 0.05, Config(bits=2, rows=8, scale_dtype="float32"))
    start = clustering.tables_RK.clone()
    clustering.train()
    soft = clustering()
    assert len(soft.unique()) > 50 and not torch.equal(clustering.tables_RK, start)
    clustering.eval()
    hard = clustering()
    stored = clustering.codes()
    assert torch.equal(hard, stored.weight()) and all(len(part.unique()) <= 4 for part in hard.split(8))
    present, count, value = histogram(clustering.weight[:8].detach().bfloat16())
    assert int(count.sum()) == 8 * 24 and len(present) == len(value.unique())
    soft_U, table = assign(value, value, count, start[0], clustering.tau, 1, 0.0)
    assert soft_U.shape == value.shape and float((table - start[0]).abs().max()) > 0
