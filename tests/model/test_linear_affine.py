"""The form `affine`: its equation in float64, its bytes, and `int4` as its case of four bits."""

import numpy as np
import pytest
import torch

from modicum.model.linear import LinearShape
from modicum.model.linear.affine import Affine, Config, pack, unpack
from modicum.model.linear.int4 import Config as Int4Config
from modicum.model.linear.int4 import Int4


def weights(rows: int = 6, inputs: int = 40) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_loses_nothing_and_wastes_no_bit(bits: int) -> None:
    codes = torch.randint(2**bits, (5, 48), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 48 * bits // 8) and torch.equal(unpack(packed, bits), codes)


def test_layout_of_three_bits_is_two_planes() -> None:
    packed = pack(torch.tensor([[7, 0, 1, 2, 4, 0, 0, 5]], dtype=torch.uint8), 3)
    assert packed.tolist() == [[0b10_01_00_11, 0b01_00_00_00, 0b1001_0001]]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weight_is_the_equation_in_float64(bits: int) -> None:
    weight = weights()
    form = Affine(Config(bits=bits, group=16, scale_dtype="float32"), LinearShape.of(weight, None)).fit(weight)
    W = weight.double().numpy()
    for start in (0, 16, 32):
        group = W[:, start : start + 16]
        low, high = group.min(1, keepdims=True), group.max(1, keepdims=True)
        step = (high - low) / (2**bits - 1)
        wanted = np.rint((group - low) / step) * step + low
        found = form.dense()[:, start : start + 16].double().numpy()
        edge = np.abs((group - low) / step % 1 - 0.5) < 1e-4  # float32 may round these either way
        assert edge.mean() < 0.05 and np.abs(found - wanted)[~edge].max() < 1e-5
        assert np.abs(found - group).max() <= step.max() / 2 + 1e-6


def test_four_bits_are_int4() -> None:
    weight = weights(8, 72)
    shape = LinearShape.of(weight, None)
    ours, theirs = Affine(Config(bits=4, group=32), shape).fit(weight), Int4(Int4Config(group=32), shape).fit(weight)
    assert torch.equal(ours.dense(), theirs.dense()) and ours.nbytes() == theirs.nbytes()


@pytest.mark.parametrize("bits, per_weight", [(2, 2.5), (3, 3.5)])
def test_bytes_are_bits_and_two_numbers_per_group(bits: int, per_weight: float) -> None:
    weight = weights(16, 128)
    form = Affine(Config(bits=bits, group=64), LinearShape.of(weight, None)).fit(weight)
    assert 8 * form.nbytes() == per_weight * weight.numel()
