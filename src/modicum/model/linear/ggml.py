"""ggml: weights in ggml's blocks of 32, as GGUF files hold them: q4_0, q4_1 or q8_0.

    q4_0: W = d (q - 8),  q in 0..15       4.5 bits per weight
    q4_1: W = d q + m,    q in 0..15       5 bits
    q8_0: W = d q,        q in -128..127   8.5 bits

with one d (and m) in float16 for every 32 inputs of an output (`ggml-common.h`, `block_q4_0` and others). `take`
takes over a file's blocks without rounding anything; `fit` rounds as ggml's reference does (d = the entry of largest
magnitude / -8; range / 15; max |W| / 127; codes are computed with d before it is rounded). What differs from the file
is where the bits lie: scales apart from codes, and inputs 2i and 2i+1 in one byte instead of i and i+16, which is
what the kernels for int4 and int8 read. Inputs that do not fill the last block are padded, and the padding is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from modicum.model.gguf.quantize import quantize
from modicum.model.linear import LinearShape
from modicum.model.linear._quantised import QuantisedForm

BLOCK = 32  # inputs that share a scale
HEADER = {"q4_0": 2, "q4_1": 4, "q8_0": 2}  # bytes of a block before its codes

SWEEP = {"type": ("q4_0", "q8_0")}


@dataclass(frozen=True, kw_only=True)
class Config:
    type: Literal["q4_0", "q4_1", "q8_0"] = "q4_0"  # ggml's name of the block


class Ggml(QuantisedForm):
    provides = frozenset({"adapter_base", "embedding", "fit", "merge"})
    stored = frozenset({"scale", "minimum"})
    fit_error = 0.12
    config: Config
    codes: Tensor
    scale: Tensor
    minimum: Tensor

    def __init__(self, config: Config, shape: LinearShape):
        super().__init__(config, shape)
        self.group, self.n_groups = BLOCK, -(-shape.in_features // BLOCK)
        out, padded, whole = shape.out_features, self.n_groups * BLOCK, config.type == "q8_0"
        dtype = torch.int8 if whole else torch.uint8
        self.register_buffer("codes", self._empty(out, padded if whole else padded // 2, dtype=dtype))
        self.register_buffer("scale", self._empty(out, self.n_groups, dtype=torch.float16))
        minima = self.n_groups if config.type == "q4_1" else 0
        self.register_buffer("minimum", self._empty(out, minima, dtype=torch.float16))

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        weight = weight_OI.to("cpu", torch.float32)
        # Pad by repeating the last input: zeros would widen the last block's range.
        missing = self.n_groups * BLOCK - self.in_features
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
        self.take_blocks(quantize(weight, self.config.type))

    def take_blocks(self, blocks_OB: Tensor) -> Self:
        """Take over the bytes of ggml's blocks, uint8 (O, bytes of a row), as they are."""
        header = HEADER[self.config.type]
        size = header + (BLOCK if self.config.type == "q8_0" else BLOCK // 2)
        blocks_OGb = blocks_OB.reshape(self.out_features, self.n_groups, size)
        numbers_OGn = blocks_OGb[..., :header].contiguous().view(torch.float16)
        body_OGb = blocks_OGb[..., header:].contiguous()
        self.scale.copy_(numbers_OGn[..., 0])
        if self.config.type == "q8_0":
            self.codes.copy_(body_OGb.view(torch.int8).flatten(1))
            return self
        if self.config.type == "q4_1":
            self.minimum.copy_(numbers_OGn[..., 1])
        # Byte i holds input i in its low half and input i + 16 in the high one. Two bytes at a time, as one number:
        # their low halves are the inputs of one byte here, their high halves those of another.
        two = body_OGb.view(torch.int16)
        first, second = (two & 0x0F) | (two >> 4) & 0xF0, (two >> 4) & 0x0F | (two >> 8) & 0xF0
        self.codes.copy_(torch.cat([first, second], -1).flatten(1))
        return self

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self._decode(self.codes, self.scale, self.minimum, dtype)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.flatten()
        rows = self._decode(self.codes[flat], self.scale[flat], self.minimum[flat], self.dtype)
        return rows.view(*index.shape, self.in_features)

    def _decode(self, codes: Tensor, scale: Tensor, minimum: Tensor, dtype: torch.dtype) -> Tensor:
        """In float32, where d q is exact, rounded to `dtype` once."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        if self.config.type != "q8_0":
            codes = torch.stack([codes & 15, codes >> 4], -1)
        values = codes.reshape(-1, self.n_groups, BLOCK).to(exact)
        if self.config.type == "q4_0":
            values -= 8
        values *= scale.to(exact)[..., None]
        if self.config.type == "q4_1":
            values += minimum.to(exact)[..., None]
        return values.flatten(1)[:, : self.in_features].to(dtype)
