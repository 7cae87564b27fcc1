"""What the kernels for the CPU can run: which models, and how their matrices are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.layers import MLP, Block
from modicum.model.linear import LinearForm
from modicum.serve import native

AFFINE_KINDS = {2: native.TWO_BITS, 3: native.THREE_BITS, 4: native.INT4, 8: native.INT8}
KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}


def stored(module: Any) -> tuple[int, Tensor, Tensor | None, Tensor | None] | None:
    """Kind, weight, scale and zero of a linear layer the kernels can read; None for any other."""
    from modicum.model.linear.affine import Affine
    from modicum.model.linear.dense import Dense
    from modicum.model.linear.ggml import Ggml
    from modicum.model.linear.int4 import Int4
    from modicum.model.linear.int8 import Int8

    if type(module) in (nn.Linear, Dense):
        weight = module.weight
        ok = weight.dtype in KINDS and weight.is_contiguous() and weight.device.type == "cpu"
        return (KINDS[weight.dtype], weight, None, None) if ok else None
    if type(module) is Int8 and (module.n_groups == 1 or module.group == 32 or module.group % 64 == 0):
        return native.INT8, module.codes, module.scale, None
    if type(module) is Int4 and (module.group in (32, 64) or module.group % 128 == 0) and module.in_features % 16 == 0:
        return native.INT4, module.packed, module.scale, module.zero
    if type(module) is Affine and module.in_features % 16 == 0:
        whole = module.in_features % module.group == 0
        fits = module.group in (64, 128) or module.group % 256 == 0
        if module.bits == 8:
            fits = whole and (module.group == 32 or module.group % 64 == 0)
        elif module.bits == 4:
            fits = module.group in (32, 64) or module.group % 128 == 0
        return (AFFINE_KINDS[module.bits], module.packed, module.scale, module.zero) if fits else None
    if type(module) is Ggml and module.in_features % module.group == 0:
        kind = native.INT8 if module.config.type == "q8_0" else native.INT4
        return kind, module.codes, module.scale, module.minimum if module.config.type == "q4_1" else None
    return None


def unserved(model: Decoder, cache: torch.dtype) -> str | None:
    """Why the kernels cannot run this model, in a few words; None if they can."""
    c: DecoderConfig = model.config
    odd = {
        "not on the CPU": model.device.type != "cpu",
        f"{model.dtype} weights": model.dtype not in KINDS,
        f"a {cache} cache": cache not in KINDS,
        f"norm {c.norm!r}": c.norm == "layer",
        f"{c.norm_place!r} norms": c.norm_place == "after",
        "parallel blocks": c.parallel,
        "learned positions": c.position != "rope",
        "longrope positions": any(table.long is not None for table in model.ropes()[0]),
        "projected embeddings": c.embed_width not in (None, c.width),
        f"the attention pattern {c.attention}": c.attention is not None,
        f"the mixer {c.mixer}": c.mixer != "softmax",
    }
    if differ := c.varying - {"window", "rope", "scale"}:
        return f"layers that differ in {', '.join(sorted(differ))}"
    for words, wrong in odd.items():
        if wrong:
            return words
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear | LinearForm)
        if (
            linear
            and name.endswith((".q", ".k", ".v", ".o", ".gate", ".up", ".down", "lm_head"))
            and not stored(module)
        ):
            return f"{name} is {type(module).__name__}"
    for i, block in enumerate(model.layers):
        if isinstance(block, Block) and type(block.mlp) is not MLP:
            return f"the MLP of layer {i} is a {type(block.mlp).__name__}"
        if c.gated and isinstance(block, Block):
            gate, up = block.mlp.gate, block.mlp.up
            kinds = {(type(m), getattr(m, "group", 0), codes[0] if (codes := stored(m)) else None) for m in (gate, up)}
            if len(kinds) > 1:
                return f"gate and up of layer {i} are held differently"
    return None


def unserved_in_eight(model: Decoder) -> str | None:
    if not native.multiplies_in_eight_bits():
        return "a processor without VNNI and bfloat16 products"
    if model.dtype != torch.bfloat16:
        return f"a model in {str(model.dtype).removeprefix('torch.')}, not in bfloat16 (--dtype bfloat16)"
    if not any((codes := stored(m)) and codes[0] in (native.INT8, native.INT4) for m in model.modules()):
        return "no int8 or int4 matrix (--form int8)"
    return None
