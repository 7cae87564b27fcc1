"""Products of bfloat16 through float32, where a processor has none: the exact product rounded once, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.model import wide
from modicum.model.attach import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.native import products


@pytest.fixture(autouse=True)
def lacking(monkeypatch):
    """As on a processor without products of bfloat16; weights are widened in several parts."""
    monkeypatch.setattr(products, "lacking", lambda: True)
    monkeypatch.setattr(products, "WIDENED", 64 * 40)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).bfloat16()


def close(got: Tensor, want: Tensor) -> bool:
    """Equal but where float32 and float64 round to neighbouring numbers."""
    apart = (got.double() - want.double()).abs() / want.double().abs().clamp_min(1e-3)
    return got.dtype == want.dtype and float(apart.max()) < 2**-7 and float((apart > 0).double().mean()) < 0.01


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(9, 64, 96), (33, 50, 7), (200, 130, 129)])
def test_each_product_is_the_exact_one_rounded_once(rows, inputs, outputs):
    x, weight, grad = draw(rows, inputs), draw(outputs, inputs, seed=1), draw(rows, outputs, seed=2)
    assert close(products.forward(x, weight), exact(x, weight.t()))
    assert close(products.backward(grad, weight), exact(grad, weight))
    assert close(products.weight_gradient(grad, x), exact(grad.t(), x))
    y = draw(rows, outputs, seed=3)
    want = (y.double() + x.double() @ weight.double().t()).bfloat16()
    apart = (products.add(y, x, weight).double() - want.double()).abs()
    assert float(apart.max()) <= float(want.abs().max()) * 2**-7  # the product is rounded, then the sum


def test_a_linear_layer_inside_takes_it_and_one_outside_does_not(monkeypatch):
    taken = []
    real = products.forward
    monkeypatch.setattr(products, "forward", lambda x, w: taken.append(tuple(x.shape)) or real(x, w))
    layer, x = nn.Linear(32, 16).bfloat16(), draw(3, 8, 32)
    outside = layer(x)
    assert not taken
    with wide.widened(x):
        inside = layer(x)
        few = layer(x[:1, :2])
    assert taken == [(24, 32)] and few.shape == (1, 2, 16)
    assert float((inside - outside).detach().abs().max()) < 0.05
    with wide.widened(x.float()):
        F.linear(x, layer.weight)
    assert len(taken) == 1


def test_keywords_and_out_mean_what_they_do_outside():
    a, b = draw(16, 8), draw(8, 16, seed=1)
    want, out = exact(a, b), torch.empty(16, 16).bfloat16()
    with wide.widened(a):
        assert torch.matmul(a, b, out=out) is out and close(out, want)
        assert close(torch.matmul(input=a, other=b), want) and close(a @ b, want)
        assert close(F.linear(input=a, weight=b.t()), want) and close(F.linear(a, weight=b.t()), want)


def test_gradients_inside_are_those_of_float32():
    x, weight, bias = (t.requires_grad_() for t in (draw(16, 24), draw(40, 24, seed=1), draw(40, seed=2)))
    with wide.widened(x):
        (F.linear(x, weight, bias) @ draw(40, 8, seed=3)).float().sum().backward()
    wide_x, wide_w, wide_b = (t.detach().float().requires_grad_() for t in (x, weight, bias))
    (F.linear(wide_x, wide_w, wide_b) @ draw(40, 8, seed=3).float()).sum().backward()
    for got, want in ((x, wide_x), (weight, wide_w), (bias, wide_b)):
        assert float((got.grad.float() - want.grad).norm() / want.grad.norm()) < 0.01


def gradients(form: str | None, checkpointed: bool, dtype: torch.dtype) -> Tensor:
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    model = Decoder(llama_like(64, 32, 2, context_length=64), torch.Generator().manual_seed(0)).to(dtype)
    if form:
        attach(model, {"layers.*": form}, generator=torch.Generator().manual_seed(1))
    model.checkpoint_layers = checkpointed
    model.train()
    F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten()).backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("form", [None, "lora:rank=4", "int8"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_decoder_learns_no_further_from_float32_than_in_bfloat16(form, checkpointed, monkeypatch):
    want, got = gradients(form, checkpointed, torch.float32), gradients(form, checkpointed, torch.bfloat16)
    monkeypatch.setattr(products, "lacking", lambda: False)
    plain = gradients(form, checkpointed, torch.bfloat16)
    assert float((got - want).norm()) <= 1.2 * float((plain - want).norm())
