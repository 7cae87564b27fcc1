"""What must hold for every attention pattern."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.core import registry
from modicum.model.attention import ALL, NONE, AttentionPattern


def _make(key: str) -> AttentionPattern:
    loaded = registry.load("attention", key, AttentionPattern)
    return loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())


def check_allowed_is_causal_and_total(key: str) -> None:
    """No query sees a later key, and every query sees at least one."""
    position = torch.arange(41)
    seen = _make(key).allowed(position[:, None], position[None, :])
    assert seen.dtype == torch.bool, f"allowed must be bool, it is {seen.dtype}"
    assert seen.shape == (41, 41), f"allowed must broadcast to (41, 41), it gave {tuple(seen.shape)}"
    assert not seen.triu(1).any(), "a query sees a key after it"
    assert seen.any(dim=1).all(), "a query sees no key at all"


def check_blocks_agree_with_allowed(key: str) -> None:
    """Each entry of the block mask says NONE, SOME or ALL exactly as the elementwise predicate does."""
    pattern = _make(key)
    for q_len, k_len, size in ((1, 1, 4), (16, 16, 4), (13, 29, 4), (29, 29, 8), (1, 30, 16), (7, 40, 1)):
        blocks = pattern.blocks(q_len, k_len, size)
        assert blocks.dtype == torch.uint8
        assert blocks.shape == (-(-q_len // size), -(-k_len // size))
        q_pos, k_pos = torch.arange(k_len - q_len, k_len), torch.arange(k_len)
        truth = pattern.allowed(q_pos[:, None], k_pos[None, :])
        for i in range(blocks.shape[0]):
            for j in range(blocks.shape[1]):
                part = truth[i * size : (i + 1) * size, j * size : (j + 1) * size]
                expected = ALL if part.all() else 1 if part.any() else NONE
                where = f"block ({i}, {j}) of {q_len=} {k_len=} {size=}"
                assert blocks[i, j] == expected, f"{where} is {blocks[i, j]}, allowed says {expected}"


def check_counts_agree_with_allowed(key: str) -> None:
    """`keys_per_query` is the true average."""
    pattern = _make(key)
    for length in (1, 4, 5, 33):
        position = torch.arange(length)
        seen = pattern.allowed(position[:, None], position[None, :])
        assert abs(pattern.keys_per_query(length) - seen.sum().item() / length) < 1e-9


def check_a_model_has_the_pattern(key: str) -> None:
    """A decoder of this pattern sees what `allowed` says, in one pass, packed and from a cache."""
    from modicum.core.choice import Choice
    from modicum.model.cache import ContiguousCache
    from modicum.model.config import llama_like
    from modicum.model.decoder import Decoder

    knobs = dataclasses.asdict(_make(key).config)
    shape = llama_like(50, 32, 2, heads=2, attention=str(Choice("attention", key, knobs)), context_length=64)
    model = Decoder(shape, torch.Generator().manual_seed(0)).double()
    tokens_BT = torch.randint(0, 50, (2, 27), generator=torch.Generator().manual_seed(1))
    row, pattern = torch.arange(27), _make(key)
    seen = pattern.allowed(row[:, None], row[None, :])

    def by_mask(layer: int, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[: q.shape[2], : k.shape[2]], scale=how["scale"])

    with torch.no_grad():
        expected = model(tokens_BT, attend=by_mask)
        torch.testing.assert_close(model(tokens_BT), expected)
        packed = torch.cat([tokens_BT, tokens_BT], 1)
        documents_BT = (torch.arange(54) // 27).expand(2, -1)
        torch.testing.assert_close(model(packed, documents_BT=documents_BT)[:, 27:], expected)
        cache = ContiguousCache(shape, 2, 27, dtype=torch.float64)
        parts = [model(part, attend=cache) for part in tokens_BT.split([9, 1, 1, 14, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected)


def check_block_attention_is_exact(key: str) -> None:
    """Attention over the mask's blocks alone equals attention under the elementwise mask, in float64."""
    from modicum.model.attend import BlockAttend

    pattern = _make(key)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 37, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 37, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    out = BlockAttend(pattern, size=8)(0, q, k, v, window=None, scale=0.3, softcap=None)
    position = torch.arange(37)
    scores = torch.einsum("bgrqe,bgke->bgrqk", q.view(2, 2, 2, 37, 8), k) * 0.3
    scores = scores.masked_fill(~pattern.allowed(position[:, None], position[None, :]), float("-inf"))
    naive = torch.einsum("bgrqk,bgke->bgrqe", scores.softmax(-1), v).reshape(2, 4, 37, 8)
    assert torch.allclose(out, naive, atol=1e-12), f"largest difference {(out - naive).abs().max()}"
