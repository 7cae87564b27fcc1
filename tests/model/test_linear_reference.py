"""Linear forms against their defining equations, computed naively in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.linear import LinearForm, LinearShape, unique_tensors


def fitted(
    choice: str, weight: torch.Tensor, bias: torch.Tensor | None = None, base: LinearForm | None = None
) -> LinearForm:
    form = registry.build("linear", choice, LinearShape.of(weight, bias), *([] if base is None else [base]))
    return form.fit(weight, bias, generator=torch.Generator().manual_seed(0))


def gaussian(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def groups(width: int, group: int) -> list[slice]:
    return [slice(i, min(i + group, width)) for i in range(0, width, group)]


@pytest.mark.parametrize("width,group", [(64, 0), (64, 32), (50, 16)])
def test_int8_is_the_nearest_code_of_each_group(width: int, group: int) -> None:
    weight = gaussian(6, width) * 0.1
    form = fitted(f"int8:group={group},scale_dtype=float32", weight)
    for row in range(6):
        for part in groups(width, group or width):
            values = weight[row, part].double()
            scale = values.abs().max() / 127
            expected = (values / scale).round() * scale
            got = form.dense()[row, part].double()
            torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-5)
            assert (got - values).abs().max() <= scale / 2 * 1.001


@pytest.mark.parametrize("width,group", [(64, 64), (64, 16), (49, 16), (10, 64)])
def test_int4_is_the_nearest_code_of_each_group(width: int, group: int) -> None:
    weight = gaussian(5, width) * 0.1 + 0.05  # off centre, so that the zero point matters
    form = fitted(f"int4:group={group},scale_dtype=float32", weight)
    for row in range(5):
        for part in groups(width, group):
            values = weight[row, part].double()
            scale = (values.max() - values.min()) / 15
            if scale == 0:
                torch.testing.assert_close(form.dense()[row, part].double(), values, atol=1e-7, rtol=1e-6)
                continue
            codes = ((values - values.min()) / scale).round()
            got = form.dense()[row, part].double()
            torch.testing.assert_close(got, values.min() + codes * scale, atol=1e-6, rtol=1e-5)
            assert (got - values).abs().max() <= scale / 2 * 1.001


def test_int4_packs_even_inputs_low_and_odd_inputs_high() -> None:
    weight = torch.arange(16.0)[None]  # scale 1, zero 8: the codes are the values
    form = fitted("int4:group=16", weight)
    assert form.packed[0].tolist() == [(2 * i) | (2 * i + 1) << 4 for i in range(8)]
    assert torch.equal(form.dense(), weight)


@pytest.mark.parametrize(
    "choice,bits",
    [
        ("int8", 8 + 16 / 256),
        ("int8:group=64", 8 + 16 / 64),
        ("int4:group=64", 4 + 32 / 64),
        ("int4:group=128", 4 + 32 / 128),
    ],
)
def test_stored_bits_per_weight(choice: str, bits: float) -> None:
    form = fitted(choice, gaussian(32, 256))
    assert form.nbytes() * 8 == 32 * 256 * bits


@pytest.mark.parametrize("choice", ["int8", "int8:group=32", "int4", "int4:group=32"])
def test_constant_zero_and_tiny_weights_survive(choice: str) -> None:
    for value in (0.0, 1.0, -3e-30):
        weight = torch.full((4, 64), value)
        dense = fitted(choice, weight).dense()
        torch.testing.assert_close(dense, weight, rtol=0.01, atol=1e-35)


def test_scales_are_rounded_up_so_that_nothing_clips() -> None:
    weight = gaussian(64, 64)
    form = fitted("int8", weight)
    assert (weight.abs() <= 127 * form.scale.float()).all()
    assert ((form.dense() - weight).abs() <= form.scale.float() / 2 * 1.0001).all()


@pytest.mark.parametrize("choice", ["int8", "int4:group=32", "int4:group=64"])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_fused_kernel_agrees_with_the_decoded_weight(choice: str, rows: int) -> None:
    weight, bias = gaussian(48, 128).bfloat16(), gaussian(48).bfloat16()
    form = fitted(choice, weight, bias)
    x = gaussian(rows, 128, seed=3).bfloat16()
    fused = form._kernel(x)
    assert fused is not None
    truth = x.double() @ form.decode(torch.float64).T
    assert ((fused.double() - truth).norm() / truth.norm()) < 4e-3
    with torch.no_grad():
        torch.testing.assert_close(form(x), fused + form.bias)  # forward takes that path


def test_kernel_weight_follows_newly_loaded_state() -> None:
    x = gaussian(2, 64).bfloat16()
    first, second = (fitted("int4:group=32", gaussian(16, 64, seed=s).bfloat16()) for s in (1, 2))
    with torch.no_grad():
        first(x)
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), second(x))


def test_quantised_backward_keeps_no_dense_weight() -> None:
    form = fitted("int4", gaussian(64, 64))
    saved: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        form(gaussian(2, 64).requires_grad_()).sum().backward()
    assert torch.Size([64, 64]) not in saved


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_equation(rslora: bool) -> None:
    weight, bias = gaussian(12, 20), gaussian(12)
    form = fitted(f"lora:rank=3,alpha=5,rslora={rslora}", weight, None, fitted("dense", weight, bias))
    assert not form.B.any() and form.A.abs().max() <= math.sqrt(6 / (6 * 20))  # Kaiming, a = sqrt(5)
    with torch.no_grad():
        form.B.copy_(gaussian(12, 3, seed=1))
    x = gaussian(4, 20, seed=2)
    scale = 5 / (math.sqrt(3) if rslora else 3)
    expected = x.double() @ (weight + scale * form.B @ form.A).double().T + bias
    torch.testing.assert_close(form(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in form.trainable()) == 3 * (12 + 20)


def test_lora_dropout_acts_on_the_update_while_training_only() -> None:
    weight = gaussian(8, 8)
    form = fitted("lora:rank=2,dropout=0.5", weight, None, fitted("dense", weight))
    with torch.no_grad():
        form.B.fill_(1.0)
    x = gaussian(64, 8)
    assert torch.equal(form.eval()(x), form.eval()(x))
    torch.manual_seed(0)
    noisy = form.train()(x)
    torch.manual_seed(0)
    update = F.dropout(x, 0.5) @ (form.scaling * form.B @ form.A).T
    torch.testing.assert_close(noisy, x @ weight.T + update, atol=1e-5, rtol=1e-5)


def test_lora_gradients_over_int4_are_those_over_its_decoded_weight() -> None:
    weight = gaussian(32, 32)
    over = {}
    base4 = fitted("int4:group=32", weight)
    for name, base in (("int4", base4), ("dense", fitted("dense", base4.dense()))):
        form = fitted("lora:rank=4", weight, None, base)
        with torch.no_grad():
            form.B.copy_(gaussian(32, 4, seed=5))
        form(gaussian(6, 32, seed=6)).square().sum().backward()
        over[name] = (form.A.grad, form.B.grad)
    for left, right in zip(*over.values(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-5)


def test_cost_needs_no_memory() -> None:
    def cost(choice: str, tokens: float = 0) -> Cost:
        picked = Choice.parse("linear", choice)
        return registry.load("linear", picked.method).cls.cost(picked.config(), (8192, 4096), tokens)

    adapter = cost("lora:rank=16", tokens=10)
    assert adapter.parameters == 16 * (8192 + 4096) and adapter.disk_bytes == 2 * adapter.parameters
    assert adapter.flops == 2 * 10 * adapter.parameters
    quantised = cost("int4:group=64", tokens=10)
    assert quantised.parameters == 0 and quantised.disk_bytes == 8192 * 4096 * 4.5 / 8
    assert quantised.flops == 2 * 10 * 8192 * 4096
    assert cost("dense").parameters == 8192 * 4096


def test_unique_tensors_counts_a_shared_tensor_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    assert list(unique_tensors(module)) == ["0.weight"]


@pytest.mark.parametrize(
    "choice,word",
    [
        ("lora:rank=0", "rank"),
        ("int4:group=3", "group"),
        ("int8:group=-1", "group"),
        ("lora:dropout=1", "dropout"),
        ("int4:scale_dtype=int8", "scale_dtype"),
    ],
)
def test_impossible_knobs_are_refused(choice: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        registry.build("linear", choice, LinearShape(in_features=8, out_features=8))
