"""Reference test of linear/ggml: the blocks of the gguf package, bit for bit, in every type and dtype."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from modicum.model.linear import LinearShape, _conformance, ggml
from modicum.model.linear.ggml import Config, Ggml

TYPES = ("q4_0", "q4_1", "q8_0")
OUT, IN = 6, 96


def blocks(type_: str, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Blocks of random bytes with finite scales, uint8 (O, bytes), and what the gguf package makes of them."""
    rng = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_.upper()]][1]
    raw = rng.integers(0, 256, (OUT, IN // 32, size), dtype=np.uint8)
    header = ggml.HEADER[type_]
    raw[..., :header] = rng.normal(size=(OUT, IN // 32, header // 2)).astype(np.float16).view(np.uint8)
    raw = raw.reshape(OUT, -1)
    return torch.from_numpy(raw), gguf.dequantize(raw, gguf.GGMLQuantizationType[type_.upper()])


def form_of(type_: str, dtype: torch.dtype = torch.float64) -> Ggml:
    return Ggml(Config(type=type_), LinearShape(in_features=IN, out_features=OUT, dtype=dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("type_", TYPES)
def test_blocks_are_those_of_the_gguf_package(type_: str) -> None:
    raw, wanted = blocks(type_)
    form = form_of(type_).take_blocks(raw)
    assert np.array_equal(form.dense().float().numpy(), wanted)
    assert np.array_equal(form.decode(torch.float32).numpy(), wanted)
    assert torch.equal(form.decode(torch.bfloat16), torch.from_numpy(wanted).bfloat16()), "rounded once"
    index = torch.tensor([[4, 0], [5, 4]])
    assert torch.equal(form.rows(index), form.dense()[index])
    x_BI = torch.randn(3, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form(x_BI), x_BI @ torch.from_numpy(wanted).double().T)
    assert form.nbytes() == raw.nbytes, "not a byte more than the file has"


@pytest.mark.parametrize("type_", TYPES)
def test_fit_rounds_as_the_gguf_package(type_: str) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2)) * 0.1
    weight[0, :32] = 0
    type_number = gguf.GGMLQuantizationType[type_.upper()]
    wanted = gguf.dequantize(gguf.quantize(weight.numpy(), type_number), type_number)
    assert np.array_equal(form_of(type_, torch.float32).fit(weight).dense().numpy(), wanted)


def test_near_misses_are_other_weights() -> None:
    """Nibbles in another order, a minimum that is subtracted, scale and minimum exchanged: none passes for q4_1."""
    raw, wanted = blocks("q4_1")
    parts = raw.view(-1, 20)
    d, m = parts[:, :4].contiguous().view(torch.float16).float().unbind(-1)
    low, high = parts[:, 4:] & 15, parts[:, 4:] >> 4
    right = torch.cat([low, high], -1)
    assert torch.equal((right * d[:, None] + m[:, None]).view(OUT, IN), torch.from_numpy(wanted))
    form = form_of("q4_1", torch.float32).take_blocks(raw).dense()
    for codes, scale, minimum in (
        (torch.cat([high, low], -1), d, m),
        (torch.stack([low, high], -1).flatten(1), d, m),
        (right, d, -m),
        (right, m, d),
    ):
        assert not torch.allclose((codes * scale[:, None] + minimum[:, None]).view(OUT, IN), form, atol=1e-2)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("check", [name for name in dir(_conformance) if name.startswith("check_")])
def test_conformance_of_every_type(type_: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "TOY", Config(type=type_), raising=False)  # type: ignore[arg-type]
    getattr(_conformance, check)("ggml")
