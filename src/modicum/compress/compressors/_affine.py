"""Integer codes with a scale and a zero point per group: what the quantisers of the port have in common.

    W ~ s (q - 2^(b-1)) + z,   q in 0..2^b - 1

Scales and zero points are numbers of the stored dtype from the start, so that what is measured is what is kept.
Shapes: O outputs, I inputs, G groups, i inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.core.choice import Choice
from modicum.core.registry import load
from modicum.model.attach import is_conv1d
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear._quantised import SCALE_DTYPES, round_up


@dataclass(frozen=True, kw_only=True)
class AffineConfig:
    """Knobs of every quantiser to integer codes."""

    bits: Literal[2, 3, 4, 8] = 4  # of a code
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64  # inputs that share scale and zero point
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale_dtype]


@dataclass(frozen=True)
class Grid:
    """Of each row: scale and zero point (O, ...) that a code is decoded with, in float32."""

    scale: Tensor
    zero: Tensor
    config: AffineConfig

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes, in float32; broadcasts over what follows the scale's dimensions."""
        step = torch.where(self.scale == 0, 1, self.scale)
        return ((weight - self.zero) / step).round().add(self.config.middle).clamp(0, 2**self.config.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.scale * (codes - self.config.middle) + self.zero

    def nearest(self, weight: Tensor) -> Tensor:
        return self.decode(self.codes(weight))


def grid(weight: Tensor, config: AffineConfig, shrink: float | Tensor = 1.0) -> Grid:
    """From the least and the largest of weight (..., i), each times `shrink`; scale and zero are (..., 1)."""
    low, high = weight.amin(-1, keepdim=True) * shrink, weight.amax(-1, keepdim=True) * shrink
    scale = round_up((high - low) / (2**config.bits - 1), config.dtype).to(weight.dtype)
    zero = (low + config.middle * scale).to(config.dtype).to(weight.dtype)
    return Grid(scale, zero, config)


@dataclass(frozen=True)
class Codes:
    """A quantised matrix: codes_OI (uint8), scale_OG and zero_OG in the stored dtype."""

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    config: AffineConfig

    @classmethod
    def of(cls, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, config: AffineConfig) -> Codes:
        return cls(codes_OI.to(torch.uint8), scale_OG.to(config.dtype), zero_OG.to(config.dtype), config)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight_OI that the codes stand for."""
        inputs = self.codes_OI.shape[1]
        scale, zero = (
            t.to(dtype).repeat_interleave(width(self.config, inputs), 1)[:, :inputs]
            for t in (self.scale_OG, self.zero_OG)
        )
        return scale * (self.codes_OI.to(dtype) - self.config.middle) + zero

    @property
    def choice(self) -> Choice:
        """The linear form that holds them: four bits have one with a fused kernel."""
        knobs: dict[str, Any] = {"group": self.config.group, "scale_dtype": self.config.scale_dtype}
        if self.config.bits == 4:
            return Choice("linear", "int4", knobs)
        return Choice("linear", "affine", {"bits": self.config.bits} | knobs)

    def form(self, layer: nn.Linear, dtype: torch.dtype) -> LinearForm:
        """A form with these codes and the bias of `layer`, to stand in its place."""
        shape = LinearShape.of(layer.weight.to("meta", dtype), layer.bias, device=str(layer.weight.device))
        form: Any = load("linear", self.choice.method).cls(self.choice.config(), shape)
        form.choice, form.transposed = self.choice, is_conv1d(layer)
        if self.config.bits == 4:
            padded = form.n_groups * form.group - self.codes_OI.shape[1]
            codes = nn.functional.pad(self.codes_OI, (0, padded), value=8)
            form.packed.copy_(codes[:, 0::2] | codes[:, 1::2] << 4)
            form.scale.copy_(self.scale_OG)
            form.zero.copy_(self.zero_OG)
        else:
            form.put(self.codes_OI, self.scale_OG, self.zero_OG)
        if form.bias is not None:
            form.bias.data.copy_(layer.bias)
        return form


def groups(weight_OI: Tensor, group: int) -> Tensor:
    """(O, I) to (O, G, i): the last group filled up with its row's last input, which widens no range."""
    missing = -weight_OI.shape[1] % group
    if not missing:
        return weight_OI.unflatten(1, (-1, group))
    return torch.cat([weight_OI, weight_OI[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, group))


def width(config: AffineConfig, inputs: int) -> int:
    """Inputs of a group, at most the whole row."""
    return min(config.group, -(-inputs // 8) * 8)


def rounded(weight_OI: Tensor, config: AffineConfig, shrink_OG: Tensor | float = 1.0) -> Codes:
    """Round to nearest, on grids whose ranges are `shrink_OG` times those of the groups."""
    inputs = weight_OI.shape[1]
    grouped_OGi = groups(weight_OI, width(config, inputs))
    made = grid(grouped_OGi, config, shrink_OG if isinstance(shrink_OG, float) else shrink_OG[..., None])
    codes_OI = made.codes(grouped_OGi).flatten(1)[:, :inputs]
    return Codes.of(codes_OI, made.scale[..., 0], made.zero[..., 0], config)
