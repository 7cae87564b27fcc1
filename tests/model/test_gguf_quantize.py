"""GGUF's tensor types: ggml's rounding bit for bit, K-quants against a naive search, refusals."""

import gguf
import numpy as np
import pytest
import torch

from modicum.core.errors import UserError
from modicum.model.gguf.quantize import TYPES, fits, quantize

EXACT = ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
K = {"q2_k": (2, 16), "q3_k": (3, 16), "q4_k": (4, 32), "q5_k": (5, 32), "q6_k": (6, 16)}  # bits, sub-block


def weights(seed: int = 0, rows: int = 24, columns: int = 512) -> torch.Tensor:
    """Ordinary rows, heavy tails, shifted ones, zeros, equal extremes of both signs, tiny and large values."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[3] = w[3] / torch.rand(columns, generator=generator).clamp(0.05)
    w[4] += 0.1
    w[5] = 0
    w[6, ::2], w[6, 1::2] = 0.5, -0.5
    w[7] *= 1e-6
    w[8] *= 1e5
    w[9] = torch.randint(-8, 8, (columns,), generator=generator).float() / 8
    w[10] = 0.25
    return w


def decode(data: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name.upper()]))


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_ggmls(name: str) -> None:
    code = gguf.GGMLQuantizationType[name.upper()]
    assert TYPES[name].code == code
    assert (TYPES[name].block, TYPES[name].bytes) == gguf.GGML_QUANT_SIZES[code]
    file_type = gguf.LlamaFileType(TYPES[name].file_type).name
    assert file_type.removeprefix("MOSTLY_").removeprefix("ALL_").removesuffix("_S").lower() == name


@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_ggmls(name: str) -> None:
    w = weights()
    want = gguf.quantize(w.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(quantize(w, name).numpy(), want.view(np.uint8).reshape(len(w), -1))


def naive(w: torch.Tensor, bits: int, sub: int) -> torch.Tensor:
    """Each sub-block from its smallest to its largest value (zero included), scales unrounded."""
    x = w.reshape(-1, sub)
    low = x.amin(1, keepdim=True).clamp(max=0)
    step = (x.amax(1, keepdim=True) - low) / (2**bits - 1)
    q = ((x - low) / step.clamp(min=1e-30)).round()
    return (q * step + low).reshape(w.shape)


@pytest.mark.parametrize("name", K)
def test_k_quants_are_no_worse_than_a_naive_rounding(name: str) -> None:
    """Although their scales are rounded to 4, 6 or 8 bits. By row, so that a large one hides nothing."""
    bits, sub = K[name]
    w = weights()
    off = (decode(quantize(w, name), name) - w).norm(dim=1)
    plain = (naive(w, bits, sub) - w).norm(dim=1)
    usual = torch.tensor([0, 1, 2, *range(11, 24)])
    if name in ("q2_k", "q4_k", "q5_k"):
        assert (off[usual] < plain[usual]).all()
    else:  # without a minimum of their own, so half a step more at an end
        assert (off[usual] < 1.25 * plain[usual]).all()
    norm = w.norm(dim=1)
    assert (off <= {2: 0.45, 3: 0.25, 4: 0.12, 5: 0.07, 6: 0.035}[bits] * norm)[[3, 4, 6, 8, 9, 10]].all()
    assert off[5] == 0


@pytest.mark.parametrize("name", ["q3_k", "q6_k", "q4_k", "q5_k", "q2_k"])
def test_every_weight_is_where_it_was(name: str) -> None:
    """One weight of a block after another is moved; no other one may change more than rounding explains."""
    bits, _ = K[name]
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (64, 256), generator=generator) * 2.0 - 1
    w = signs * 0.5
    got = decode(quantize(w, name), name)
    assert torch.equal(got.sign(), signs) and (got - w).abs().max() < 0.5 / 2 ** (bits - 2)


@pytest.mark.parametrize("name", K)
def test_a_second_pass_changes_little(name: str) -> None:
    once = decode(quantize(weights(), name), name)[[0, 1, 3, 11]]
    twice = decode(quantize(once, name), name)
    assert (twice - once).norm() < 0.6 * (once - weights()[[0, 1, 3, 11]]).norm()


def test_refusals() -> None:
    w = weights()
    with pytest.raises(UserError, match="not whole blocks of 256"):
        quantize(w[:, :96], "q4_k")
    assert fits("q4_1", 96) and not fits("q4_k", 96)
    with pytest.raises(UserError, match="GGUF type"):
        quantize(w, "q9_k")
    for value in (float("nan"), float("inf")):
        bad = w.clone()
        bad[2, 3] = value
        with pytest.raises(UserError, match="NaN or infinite"):
            quantize(bad, "q4_0")
    large = torch.full((1, 256), 1e7)
    with pytest.raises(UserError, match="range of f16"):
        quantize(large, "f16")
    with pytest.raises(UserError, match="range of float16"):
        quantize(large, "q4_1")
    assert torch.isfinite(decode(quantize(large, "bf16"), "bf16")).all()
