"""perp as a form: merged it is as sparse as its base, at the same entries; gradients through the mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modicum.model import attach
from modicum.model.linear.perp import pack, unpack


def pruned(dtype=torch.float64):
    layer = nn.Linear(21, 12, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(12, 21, generator=torch.Generator().manual_seed(0)))
        layer.weight[torch.rand(12, 21, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
        layer.bias.zero_()
    return nn.Sequential(layer, nn.LayerNorm(12, dtype=dtype))


def attached(mode, norms="false"):
    model = pruned()
    forms = attach.attach(
        model, {"0": f"perp:rank=3,alpha=6,mode={mode},norms={norms}"}, generator=torch.Generator().manual_seed(2)
    )
    return model, forms["0"]


@pytest.mark.parametrize("mode", ["mask", "scale"])
def test_zeros_survive_training_and_merging(mode):
    model, form = attached(mode)
    before, x = pruned()[0].weight.detach(), torch.randn(40, 21, dtype=torch.float64)
    assert torch.allclose(form.dense(), before, atol=1e-12), "it starts as the base"
    optimizer = torch.optim.Adam(form.trainable(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = model(x)
        attach.merge(model)
        assert torch.allclose(model(x), trained, atol=1e-12), "merging changes the function"
    after = model[0].weight
    assert torch.equal(after == 0, before == 0) and not torch.allclose(after, before, atol=1e-2)


def test_gradient_is_masked():
    _, form = attached("mask")
    with torch.no_grad():
        form.B.normal_(generator=torch.Generator().manual_seed(3))
    x = torch.randn(9, 21, dtype=torch.float64)
    form(x).square().sum().backward()
    with torch.no_grad():
        grad_OI = 2 * form(x).T @ x
        mask = (form.base.dense() != 0).double()
        torch.testing.assert_close(form.A.grad, 2.0 * form.B.T @ (grad_OI * mask))
        torch.testing.assert_close(form.B.grad, 2.0 * (grad_OI * mask) @ form.A.T)


def test_ranks_of_the_scale_are_not_alike():
    _, form = attached("scale")
    form(torch.randn(5, 21, dtype=torch.float64)).square().sum().backward()
    assert torch.linalg.matrix_rank(form.B.grad) > 1, "all ranks learn the same"


def test_the_mask_is_kept_where_a_live_weight_is_zero():
    mask = torch.rand(5, 19, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(unpack(pack(mask), 19), mask) and pack(mask).nbytes == 5 * 3
    _, form = attached("mask")
    with torch.no_grad():
        row, column = (form.base.dense() != 0).nonzero()[0].tolist()
        form.base.weight[row, column] = 0
        form.B.fill_(1.0)
    assert form.dense()[row, column] != 0


def test_norms_train_with_it():
    model, form = attached("mask", norms="true")
    assert {id(p) for p in model[1].parameters()} <= {id(p) for p in form.trainable()}
    assert all(p.requires_grad for p in model[1].parameters()) and not form.base.weight.requires_grad
