"""A small decoder in a large one's body says what it said before."""

from __future__ import annotations

import pytest
import torch
from serve_tools import lively

from modicum.bench.body import in_body
from modicum.core.errors import UserError
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_are_the_small_ones(tied: bool) -> None:
    small = lively(Decoder(llama_like(50, 32, 2, heads=4, kv_heads=2, tied=tied), torch.Generator().manual_seed(1)))
    with torch.no_grad():
        for block in small.layers:
            block.attention_norm.weight.add_(torch.rand(32))  # type: ignore[union-attr, operator]
    large = in_body(small, 96, 5)
    assert large.config.kv_heads == 6 and large.config.layers == 5
    tokens = torch.randint(50, (2, 20))
    with torch.no_grad():
        want, got = small(tokens), large(tokens)
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    assert sum(p.numel() for p in large.parameters()) > 10 * sum(p.numel() for p in small.parameters())


def test_what_does_not_fit_is_refused() -> None:
    small = Decoder(llama_like(50, 32, 2, heads=4, kv_heads=2))
    with pytest.raises(UserError, match="multiple of 16"):
        in_body(small, 40, 5)
    with pytest.raises(UserError, match="larger width"):
        in_body(small, 16, 5)
    with pytest.raises(UserError, match="plain Llama"):
        in_body(Decoder(llama_like(50, 32, 2, heads=4, qkv_bias=True)), 96, 5)
