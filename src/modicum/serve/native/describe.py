"""A decoder as the kernels read it: structures that point to where its modules hold their weights.

Nothing is stored twice, norms and biases apart, which are kept in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modicum.model.decoder import Decoder
from modicum.model.layers import Block, RMSNorm
from modicum.model.safetensor import is_mapped
from modicum.serve import native
from modicum.serve.native.support import KINDS, stored
from modicum.serve.pages import Storage

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # in the order of native/step.c
CENTERS = {native.INT8: 128, native.TWO_BITS: 2, native.THREE_BITS: 4}
SCALE_KINDS = KINDS | {torch.float16: native.FLOAT16}


class Description:
    """`shape` is what `modicum_open` reads; `keep` holds all memory it points to; `mapped` the matrices (as the kernels
    read them, a module's weight, its memory) that lie in a file's pages."""

    def __init__(self, model: Decoder, storage: Storage, eight: bool):
        self.keep: list[Any] = []
        self.mapped: list[tuple[native.Matrix, Tensor, Tensor]] = []
        self.shape = self._describe(model, storage, eight)

    def _describe(self, model: Decoder, storage: Storage, eight: bool) -> native.Model:
        c = model.config
        layers = (native.Layer * c.layers)()
        tables, table_of = model.ropes()
        for i, block in enumerate(model.layers):
            assert isinstance(block, Block)
            layer, a, m = layers[i], block.attention, block.mlp
            for name, module in zip(
                native.MATRICES, (a.q, a.k, a.v, a.o, getattr(m, "gate", None), m.up, m.down), strict=True
            ):
                setattr(layer, name, self._matrix(module))
                self._note(getattr(layer, name), module)
            for name in native.NORMS:
                norm = getattr(block if "out" in name or name.endswith("p_norm") or "att" in name else a, name, None)
                setattr(layer, name, self._norm(norm))
            index = table_of[i]
            layer.rope = -1 if index is None else index
            layer.window, layer.scale = c.per_layer[i].window or 0, c.per_layer[i].attention_scale
        ropes = (native.Rope * max(1, len(tables)))()
        for rope, table in zip(ropes, tables, strict=False):
            rope.angles, rope.rotated, rope.scale = self._floats(table.angles), 2 * len(table.angles), table.scale
        self.keep += [layers, ropes, storage]
        shape = native.Model(
            layers=c.layers,
            width=c.width,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            mlp_width=c.mlp_width,
            rotated=2 * max((len(t.angles) for t in tables), default=0),
            activation=ACTIVATIONS.index(c.activation),
            qk_norm_full=c.qk_norm == "full",
            half=model.dtype == torch.bfloat16,
            int8_activations=eight,
            ropes=len(tables),
            cache_kind=native.INT8 if storage.form.native == "int8" else KINDS[storage.form.dtype],
            block_size=storage.block_size,
            n_blocks=storage.n_blocks,
            eps=c.norm_eps,
            softcap=c.attention_softcap or 0.0,
            layer=layers,
            rope=ropes,
            final_norm=self._norm(model.norm if c.final_norm else None),
            head=self._matrix(model.lm_head),
            k_cache=storage.k.codes[0].data_ptr(),
            v_cache=storage.v.codes[0].data_ptr(),
            k_scale=None if storage.plain else storage.k.codes[1].data_ptr(),
            v_scale=None if storage.plain else storage.v.codes[1].data_ptr(),
        )
        self._note(shape.head, model.lm_head)
        return shape

    def _note(self, matrix: native.Matrix, module: Any) -> None:
        """Remember a matrix whose weight lies in a file's pages."""
        codes = None if module is None else stored(module)
        if codes and is_mapped(codes[1]):
            self.mapped.append((matrix, codes[1], codes[1].detach()))

    def _floats(self, tensor: Tensor) -> int:
        kept = tensor.detach().float().contiguous()
        self.keep.append(kept)
        return kept.data_ptr()

    def _norm(self, norm: nn.Module | None) -> int | None:
        if norm is None:
            return None
        assert isinstance(norm, RMSNorm)
        return self._floats(norm.weight.float() + 1 if norm.plus_one else norm.weight)

    def _matrix(self, module: Any) -> native.Matrix:
        if module is None:
            return native.Matrix()
        codes = stored(module)
        assert codes is not None
        kind, weight, scale, zero = codes
        out, group, groups = module.out_features, 0, 0
        if scale is not None:
            group, groups = module.group, module.n_groups
            if scale.dtype not in SCALE_KINDS:
                scale, zero = scale.float(), None if zero is None else zero.float()
        # Views of their own: this memory must stay, even if somebody gives the module's tensors another.
        kept = (None if is_mapped(weight) else weight, scale, zero)
        self.keep += [t.detach() for t in kept if t is not None]
        bias = module.bias
        return native.Matrix(
            kind,
            out,
            module.in_features,
            group,
            groups,
            0 if scale is None else SCALE_KINDS[scale.dtype],
            # The code, as an unsigned number, that stands for the zero point.
            0 if getattr(getattr(module, "config", None), "type", "") == "q4_1" else CENTERS.get(kind, 8),
            weight.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            None if bias is None else self._floats(bias),
        )
