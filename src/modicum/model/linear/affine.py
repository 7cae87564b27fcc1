"""affine: weights in two, three, four or eight bits, with a scale and a zero point per group of inputs.

    s = (max W - min W) / (2^b - 1),   z = min W + 2^(b-1) s   over the group,
    q = round((W - z) / s) + 2^(b-1) in 0..2^b - 1,   W ~ s (q - 2^(b-1)) + z

The family of which `int4` is the case b = 4 (same numbers; `int4` has a fused kernel). What `fit` does is
round-to-nearest, asymmetric, weight only (the RTN of Frantar et al. 2022, arXiv:2210.17323, section 4); the
compressors (port compressor) put better codes into the same bytes. Stored: b bits per entry and two `scale_dtype`
numbers per group: 2.5 bits per weight at bits=2,group=64, 3.5 at bits=3. A row is packed in planes: the low two bits
of all codes, four to a byte, then, at three bits, the high bit, eight to a byte; codes of eight bits less 128. Inputs
that do not fill the last group are padded, and the padding is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from modicum.model.linear import LinearShape
from modicum.model.linear._quantised import SCALE_DTYPES, QuantisedForm, round_up

SIGN = 0x80  # flipped in codes of eight bits, which are stored as signed bytes, like those of `int8`
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code, from the lowest, that lie together


@dataclass(frozen=True, kw_only=True)
class Config:
    bits: Literal[2, 3, 4, 8] = 3  # of a code
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64  # inputs that share scale and zero point
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


TOY = Config(bits=3, group=16)


class Affine(QuantisedForm):
    provides = frozenset({"adapter_base", "embedding", "fit", "merge"})
    stored = frozenset({"scale", "zero"})
    fit_error = 0.4
    config: Config
    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, config: Config, shape: LinearShape):
        super().__init__(config, shape)
        self.bits = config.bits
        self.group = min(config.group, -(-shape.in_features // 8) * 8)
        self.n_groups = -(-shape.in_features // self.group)
        dtype = SCALE_DTYPES[config.scale_dtype]
        sizes = (shape.out_features, self.n_groups)
        columns = self.n_groups * self.group * self.bits // 8
        self.register_buffer("packed", self._empty(sizes[0], columns, dtype=torch.uint8))
        self.register_buffer("scale", self._empty(*sizes, dtype=dtype))
        self.register_buffer("zero", self._empty(*sizes, dtype=dtype))

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        weight = weight_OI.to(self.packed.device, torch.float32)
        # Pad by repeating the last input: zeros would widen the last group's range.
        missing = self.n_groups * self.group - self.in_features
        weight_OGi = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, self.group))
        low, high = weight_OGi.amin(-1), weight_OGi.amax(-1)
        scale = round_up((high - low) / (2**self.bits - 1), self.scale.dtype)
        middle = 2 ** (self.bits - 1)
        zero = (low + middle * scale.float()).to(self.zero.dtype)
        step = torch.where(scale == 0, 1, scale.float())
        codes = ((weight_OGi - zero.float()[..., None]) / step[..., None]).round().add(middle)
        self.put(codes.clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(1), scale, zero)

    def put(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> None:
        """Take over codes (uint8, padded or not), scales and zero points that something else has chosen."""
        missing = self.n_groups * self.group - codes_OI.shape[1]
        codes = torch.nn.functional.pad(codes_OI, (0, missing), value=2 ** (self.bits - 1))
        self.packed.copy_(pack(codes, self.bits))
        self.scale.copy_(scale_OG)
        self.zero.copy_(zero_OG)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self._decode(self.packed, self.scale, self.zero, dtype)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.flatten()
        rows = self._decode(self.packed[flat], self.scale[flat], self.zero[flat], self.dtype)
        return rows.view(*index.shape, self.in_features)

    def _decode(self, packed: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
        codes = unpack(packed, self.bits).view(-1, self.n_groups, self.group).to(dtype) - 2 ** (self.bits - 1)
        weight = torch.addcmul(zero.to(dtype)[..., None], codes, scale.to(dtype)[..., None])
        return weight.flatten(1)[:, : self.in_features]


def pack(codes_NI: Tensor, bits: int) -> Tensor:
    """codes (uint8, below 2^bits; I a multiple of 8) to bytes (N, I bits / 8), plane by plane."""
    planes, shift = [], 0
    if bits == 8:
        return codes_NI ^ SIGN
    for width in PLANES[bits]:
        fields = (codes_NI >> shift & (2**width - 1)).unflatten(1, (-1, 8 // width))
        shifts = torch.arange(8 // width, dtype=torch.uint8, device=codes_NI.device) * width
        planes.append((fields << shifts).sum(-1, dtype=torch.uint8))
        shift += width
    return torch.cat(planes, 1)


def unpack(packed_NP: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed_NP ^ SIGN
    inputs, start, shift = packed_NP.shape[1] * 8 // bits, 0, 0
    codes = torch.zeros(packed_NP.shape[0], inputs, dtype=torch.uint8, device=packed_NP.device)
    for width in PLANES[bits]:
        plane = packed_NP[:, start : start + inputs * width // 8]
        shifts = torch.arange(8 // width, dtype=torch.uint8, device=packed_NP.device) * width
        codes |= (plane[..., None] >> shifts & (2**width - 1)).flatten(1) << shift
        start, shift = start + plane.shape[1], shift + width
    return codes
