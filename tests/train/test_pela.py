"""pela: factors are the SVD, the loss in numpy, the maximum's gradient in one entry, and a model saved with factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from train_toys import config, decoder, stream

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.data.batch import Batch
from modicum.model import attach
from modicum.model.folder import load_model, save_model
from modicum.model.linear.lowrank import rank_of
from modicum.train.loop import train
from modicum.train.objectives import Step


def batch() -> Batch:
    tokens = torch.randint(2, 60, (3, 10), generator=torch.Generator().manual_seed(2))
    targets = tokens[:, 1:].clone()
    targets[1, :4] = -100
    return Batch(tokens[:, :-1].contiguous(), targets, None, torch.arange(9).repeat(3, 1))


def prepared(**knobs):
    method = registry.build("distiller", Choice("distiller", "pela", knobs))
    return method, method.prepare(decoder(layers=4), None)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_factors_are_the_truncated_svd(ratio):
    layer = nn.Linear(30, 20)
    before = layer.weight.detach().double().numpy()
    model = nn.Sequential(layer)
    (form,) = attach.attach(model, {"0": f"lowrank:ratio={ratio}"}).values()
    u, s, v = np.linalg.svd(before)
    r = int(600 / (ratio * 50))
    assert rank_of(ratio, 20, 30) == r == len(form.A)
    np.testing.assert_allclose(form.dense().detach().numpy(), u[:, :r] * s[:r] @ v[:r], atol=1e-5)
    assert form.A.numel() + form.B.numel() <= 600 / ratio


def test_the_loss_is_the_papers():
    method, model = prepared(feature=2.0, perturbation=3.0, eps=0.01, every=3)
    given = batch()
    made = method.loss(registry.build("objective", "next-token"), model, given, Step())
    states = {}
    with torch.no_grad():
        for name, m in (("s", model), ("t", method.teacher)):
            for i, layer in enumerate(m.layers):
                layer.register_forward_hook(lambda _, __, out, at=(name, i): states.__setitem__(at, out.double()))
            m(given.tokens_BT)
        mask = given.targets_BT != -100
        feature = np.mean([float((states["s", i] - states["t", i]).square().mean(-1)[mask].sum()) for i in (0, 3)])
        apart = [
            (float((form.dense() - method.teacher.get_submodule(name).weight).abs().max()) - 0.01) ** 2
            for name, form in attach.forms(model).items()
        ]
    assert len(apart) == 28
    assert float(made.metrics["feature"]) == pytest.approx(2.0 * feature, rel=1e-4)
    assert float(made.metrics["perturbation"]) == pytest.approx(3.0 * 23 * np.mean(apart), rel=1e-4)


def test_the_maximum_reaches_one_entry_of_a_matrix():
    method, model = prepared()
    name, form = next(iter(attach.forms(model).items()))
    product = form.dense().detach().requires_grad_()
    form.dense = lambda: product  # type: ignore[method-assign]
    method._away(form, name).backward()
    assert int((product.grad != 0).sum()) == 1
    method.config = type(method.config)(eps=1e3)  # far inside eps the term pulls outwards: it is no hinge
    product.grad = None
    method._away(form, name).backward()
    assert int((product.grad != 0).sum()) == 1


def test_a_run_leaves_a_model_of_factors(tmp_path):
    model = decoder()
    dense = sum(p.numel() for p in model.parameters())
    result = train(model, stream(), config(steps=30, distiller="pela", dtype="float32", lr=1e-2), None, label="")
    assert result.loss < 4.0
    save_model(model, tmp_path / "small")
    again = load_model(tmp_path / "small", "float32")
    forms = attach.forms(again)
    assert {form.choice.method for form in forms.values()} == {"lowrank"} and len(forms) == 14
    inside = sum(m.weight.numel() for n, m in attach.linears(decoder()).items() if n.startswith("layers."))
    assert sum(p.numel() for p in again.parameters()) <= dense - inside / 2
    tokens = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), model.eval()(tokens), atol=1e-5, rtol=1e-5)


def test_another_shape_is_no_model_from_before(tmp_path):
    save_model(decoder(width=48, heads=4), tmp_path / "other")
    method, model = prepared(teacher=str(tmp_path / "other"))
    with pytest.raises(UserError, match="distil-feature"):
        method.loss(registry.build("objective", "next-token"), model, batch(), Step())
