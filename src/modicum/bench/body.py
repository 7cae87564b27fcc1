"""A small trained decoder in the body of a large one: the same outputs, at the large one's price.

What drafts gain depends on two things that no small model has at once here: answers of a trained model, which decide
how many guesses come true, and weights too large for the processor's caches, which decide what a checked guess costs.
So the small decoder's weights are put into the corner of a wider and deeper one whose other weights add exactly zero
to the residual stream (rows of outputs that are zero, as in function-preserving growth: Chen et al. 2016,
arXiv:1511.05641). Nothing is left out of the computation.
"""

from __future__ import annotations

import dataclasses

import torch

from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.model.layers import Block, RMSNorm
from modicum.model.mixers.softmax import Softmax


@torch.no_grad()
def in_body(small: Decoder, width: int, layers: int, seed: int = 0) -> Decoder:
    """A decoder of `width` and `layers` with the outputs of `small`, in its dtype.

    For decoders of the plain Llama kind; heads keep their size and how many share a KV head. Raises `UserError` for
    other kinds and for a body that is smaller than what it is to hold.
    """
    c = small.config
    plain = c.norm == "rms" and c.norm_place == "pre" and c.gated and not c.parallel and c.final_norm
    plain = (
        plain
        and c.position == "rope"
        and c.qk_norm is None
        and not c.varying
        and c.window is None
        and c.embed_scale is None
    )
    if not plain or any(name.endswith("bias") for name, _ in small.named_parameters()):
        raise UserError("only a decoder of the plain Llama kind (RMSNorm, gated, no biases, no windows) fits a body")
    heads, group = width // c.head_dim, c.heads // c.kv_heads
    if width < c.width or layers < c.layers or width % (c.head_dim * group):
        raise UserError(
            f"a body of width={width} and layers={layers} does not hold {c.width} and {c.layers} with heads of "
            f"{c.head_dim}, {group} to a KV head; give a larger width, a multiple of {c.head_dim * group}"
        )
    mlp = max(c.mlp_width, -(-int(width * 2.75) // 64) * 64)
    ratio = c.width / width  # the same numbers have this share of their mean square among so many zeros
    shape = dataclasses.replace(
        c, width=width, layers=layers, heads=heads, kv_heads=heads // group, mlp_width=mlp, norm_eps=c.norm_eps * ratio
    )
    large = Decoder(shape, torch.Generator().manual_seed(seed)).to(small.dtype)
    d, q, kv, f = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim, c.mlp_width

    torch.nn.init.zeros_(large.embed.weight)  # dimensions that the small model does not have stay zero all the way up
    large.embed.weight[:, :d] = small.embed.weight
    torch.nn.init.zeros_(large.lm_head.weight)
    large.lm_head.weight[:, :d] = small.lm_head.weight
    for i, block in enumerate(large.layers):
        assert isinstance(block, Block) and isinstance(block.attention, Softmax)
        block.attention.o.weight.zero_()
        block.mlp.down.weight.zero_()
        if i >= c.layers:
            continue
        inner = small.layers[i]
        assert isinstance(inner, Block) and isinstance(inner.attention, Softmax)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            getattr(block.attention, name).weight[:rows, :d] = getattr(inner.attention, name).weight
        block.attention.o.weight[:d, :q] = inner.attention.o.weight
        block.mlp.gate.weight[:f, :d] = inner.mlp.gate.weight
        block.mlp.up.weight[:f, :d] = inner.mlp.up.weight
        block.mlp.down.weight[:d, :f] = inner.mlp.down.weight
        for name in ("attention_norm", "mlp_norm"):
            getattr(block, name).weight[:d] = getattr(inner, name).weight * ratio**0.5
    assert isinstance(large.norm, RMSNorm) and isinstance(small.norm, RMSNorm)
    large.norm.weight[:d] = small.norm.weight * ratio**0.5
    return large.eval()
