"""bitstack: its decomposition against a plain SVD in float64, its bytes, its blocks one by one."""

import pytest
import torch
from torch import nn

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.linear import LinearShape
from modicum.model.linear.bitstack import BitStack, magnitudes, pack, unpack

OUT, IN = 20, 36


def gaussian(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def fitted(choice: str, weight: torch.Tensor, inputs: torch.Tensor | None = None) -> BitStack:
    form = registry.build("linear", choice, LinearShape.of(weight, None))
    return form.fit(weight, calibration_NI=inputs)


@pytest.mark.parametrize("shape,rank", [((20, 36), 3), ((36, 20), 3), ((20, 20), 20), ((20, 36), 1)])
def test_magnitudes_are_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    size = gaussian(*shape).abs()
    U, V = magnitudes(size, rank)
    left, sigma, right = torch.linalg.svd(size.double(), full_matrices=False)
    best = left[:, :rank] * sigma[:rank] @ right[:rank]
    torch.testing.assert_close(U.double() @ V.double(), best, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(U.norm(dim=0), V.norm(dim=1), atol=1e-4, rtol=1e-4)  # shared evenly


def test_magnitudes_of_little_rank_and_of_nothing() -> None:
    for size in (torch.ones(OUT, IN), torch.zeros(OUT, IN)):
        U, V = magnitudes(size, 4)
        assert U.isfinite().all() and V.isfinite().all()
        torch.testing.assert_close(U @ V, size, atol=1e-5, rtol=1e-5)


def test_blocks_are_those_of_the_equations() -> None:
    weight = gaussian(OUT, IN) * 0.05
    inputs = gaussian(50, IN, seed=1) * torch.linspace(0.1, 5, IN)
    form = fitted("bitstack:rank=2,blocks=4", weight, inputs)
    norm = inputs.double().norm(dim=0)
    scale = (norm / norm.mean() + 1e-3).to(torch.bfloat16).double()
    left = weight.double() * scale
    for i in range(4):
        u, sigma, v = torch.linalg.svd(left.abs(), full_matrices=False)
        root = sigma[:2].sqrt()
        U, V = (u[:, :2] * root).half().double(), (root[:, None] * v[:2]).half().double()
        U, V = (U, V) if U[:, 0].sum() > 0 else (-U, -V)
        block = torch.where(left >= 0, 1.0, -1.0) * (U @ V)
        torch.testing.assert_close(form.block_weight(i).double(), block / scale, atol=2e-4, rtol=2e-2)
        left = left - form._block(i).double()  # as rounded: the next block mends that too
    torch.testing.assert_close(form.dense().double(), (weight.double() * scale - left) / scale, atol=1e-6, rtol=1e-5)


def test_inputs_that_are_large_lose_less() -> None:
    weight, loud = gaussian(OUT, IN), torch.arange(IN) % 4 == 0
    inputs = gaussian(200, IN, seed=1) * torch.where(loud, 8.0, 0.5)
    lost = {
        name: (fitted("bitstack:rank=2,blocks=2", weight, x).dense() - weight)
        for name, x in (("aware", inputs), ("blind", None))
    }
    assert lost["aware"][:, loud].norm() < 0.7 * lost["blind"][:, loud].norm()
    assert (inputs @ lost["aware"].T).norm() < 0.7 * (inputs @ lost["blind"].T).norm()


def test_each_block_takes_about_a_bit_and_lowers_the_error() -> None:
    weight = gaussian(256, 512)
    form = fitted("bitstack:rank=1,blocks=6", weight)
    assert form.block_nbytes(0) == 256 * 512 / 8 + 2 * (256 + 512)
    assert form.nbytes() == 6 * form.block_nbytes(0) + 2 * 512
    errors = []
    for n in range(6, 0, -1):
        form.set_layout({"blocks": n})
        errors.append(((form.dense() - weight).norm() / weight.norm()).item())
    assert errors == sorted(errors)
    # One sign bit and one magnitude: E|w|^2 / E w^2 = 2 / pi of a Gaussian's energy is there.
    assert errors[-1] == pytest.approx((1 - 2 / torch.pi) ** 0.5, rel=0.02)


def test_signs_fill_bytes_row_by_row() -> None:
    bits = gaussian(3, 11) > 0
    assert pack(bits).shape == (3, 2) and torch.equal(unpack(pack(bits), 11), bits)
    assert pack(torch.tensor([[True] + [False] * 8 + [True]])).tolist() == [[1, 2]]


def test_blocks_come_off_and_go_on_unchanged() -> None:
    form = fitted("bitstack:rank=2,blocks=4", gaussian(OUT, IN))
    whole, top = form.dense(), form.block_3.clone()
    form.set_layout({"blocks": 3})
    assert form.loaded == 3 and form.available == 4 and not hasattr(form, "block_3")
    without = form.dense()
    form.set_layout({"blocks": 4})
    form.block_3.copy_(top)
    assert torch.equal(form.dense(), whole) and not torch.equal(without, whole)
    index = torch.tensor([[3, 0], [3, 19]])
    torch.testing.assert_close(form.rows(index), whole[index])
    form.partial_sum = torch.zeros(OUT, IN)
    assert form.dense().abs().max() == 0 and form(torch.ones(1, IN)).abs().max() == 0


def test_bits_are_shared_by_the_layers_attached_together() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    forms = attach.attach(model, {"*": "bitstack:rank=2,blocks=8,bits=5"})
    held = sum(f.loaded * f.block_nbytes(0) for f in forms.values())
    weights = 64 * 64 + 64 * 128
    assert 8 * held / weights <= 5 < 8 * (held + max(f.block_nbytes(0) for f in forms.values())) / weights
    counts = [f.loaded for f in forms.values()]
    assert max(counts) - min(counts) <= 1 and [f.available for f in forms.values()] == counts


@pytest.mark.parametrize(
    "choice,word",
    [
        ("bitstack:rank=21,blocks=2", "rank <= 20"),
        ("bitstack:rank=0", "at least 1"),
        ("bitstack:blocks=0", "1 to 64"),
        ("bitstack:rank=2,bits=-1", "positive"),
        ("bitstack:rank=2,bits=0.5", "one block of each layer takes"),
    ],
)
def test_impossible_knobs_are_one_clear_line(choice: str, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        attach.attach(nn.Sequential(nn.Linear(IN, OUT)), {"*": choice})
    assert "\n" not in str(caught.value)


def test_useless_calibration_and_attaching_twice_are_refused() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    for inputs in (torch.zeros(5, IN), torch.full((5, IN), torch.nan)):
        with pytest.raises(UserError, match="all zero"):
            attach.attach(model, {"*": "bitstack:rank=2"}, calibration={"0": inputs})
    attach.attach(model, {"*": "bitstack:rank=2"})
    with pytest.raises(UserError, match="already"):
        attach.attach(model, {"*": "bitstack:rank=2"})
