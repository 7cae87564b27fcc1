"""Rotary position embeddings: frequencies, tables, rotation.

Shapes: B batch, T tokens, H heads, D head_dim, R rotated dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model import fused, native
from modicum.model.config import Rope


def frequencies(rope: Rope, head_dim: int, context_length: int, *, long: bool = False) -> tuple[Tensor, float]:
    """(R/2 angles per position step in float32, factor on cos and sin).

    linear: Chen et al. 2023, arXiv:2306.15595. yarn: Peng et al. 2023, arXiv:2309.00071. llama3: Llama 3.1.
    longrope: Ding et al. 2024, arXiv:2402.13753; `long` takes its factors for long sequences.
    """
    rotated = int(head_dim * rope.fraction)
    options = rope.options
    steps = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    plain = 1.0 / (rope.theta**steps)
    original = options.get("original_max_position_embeddings") or context_length
    try:
        if rope.kind == "linear":
            return plain / options["factor"], 1.0
        if rope.kind == "llama3":
            return _llama3(
                plain, options["factor"], options["low_freq_factor"], options["high_freq_factor"], original
            ), 1.0
        if rope.kind == "yarn":
            return _yarn(rope, steps, original, context_length)
        if rope.kind == "longrope":
            factors = torch.tensor(options["long_factor" if long else "short_factor"], dtype=torch.float32)
            stretch = options.get("factor") or context_length / original
            scale = options.get("attention_factor")
            if scale is None:
                scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
            return 1.0 / (factors * rope.theta**steps), scale
    except KeyError as error:
        raise UserError(
            f"RoPE scaling {rope.kind!r} lacks {error}; given: "
            f"{', '.join(options) or 'nothing'}. "
            "Add it to rope_parameters in config.json"
        ) from None
    return plain, 1.0


def _llama3(plain: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    middle = (1 - blend) * plain / factor + blend * plain
    slowed = torch.where(wavelength > original / low, plain / factor, plain)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, middle, slowed)


def _yarn(rope: Rope, steps: Tensor, original: int, context_length: int) -> tuple[Tensor, float]:
    options, rotated = rope.options, 2 * len(steps)
    factor = options.get("factor") or context_length / original

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        return rotated * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(options.get("beta_fast") or 32), dimension(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = ((torch.arange(rotated // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    plain = rope.theta**steps
    angles = ramp / (factor * plain) + (1 - ramp) / plain

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = options.get("attention_factor")
    if scale is None:
        top, bottom = options.get("mscale"), options.get("mscale_all_dim")
        scale = magnitude(top) / magnitude(bottom) if top and bottom else magnitude(1.0)
    return angles, float(scale)


class RopeTable:
    """cos and sin for positions. The frequencies are kept in float32 and are no part of the weights."""

    def __init__(self, rope: Rope, head_dim: int, context_length: int):
        self.rope = rope
        self.angles, self.scale = frequencies(rope, head_dim, context_length)
        self.long: Tensor | None = None
        if rope.kind == "longrope":
            self.long = frequencies(rope, head_dim, context_length, long=True)[0]
        self.original = rope.options.get("original_max_position_embeddings") or context_length

    def __call__(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin as B1T(R/2) in `dtype`. longrope takes the long factors if any position needs them."""
        if self.angles.device != positions_BT.device:
            self.angles = self.angles.to(positions_BT.device)
            self.long = None if self.long is None else self.long.to(positions_BT.device)
        angles = self.angles
        if self.long is not None:
            angles = torch.where(positions_BT.max() >= self.original, self.long, angles)
        turned = positions_BT[:, None, :, None].float() * angles
        return (turned.cos() * self.scale).to(dtype), (turned.sin() * self.scale).to(dtype)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension pairs (i, i + R/2) of each head; dimensions from R on pass unchanged."""
    return _Rotate.apply(x_BHTD, cos, sin, fused.can_rotate(x_BHTD, cos))


class _Rotate(torch.autograd.Function):
    """Its backward pass turns back by the same angles and needs nothing of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return native.rotate(x, cos, sin) if kernels else _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        turned = native.rotate(grad, cos, sin, -1.0) if ctx.kernels else _turned(grad, cos, sin, -1)
        return turned, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Whole rows at a time: kernels are four times as fast on them as on halves of rows."""
    half = cos.shape[-1]
    part = x[..., : 2 * half].contiguous()
    turned = (part * torch.cat([cos, cos], -1)).addcmul_(part.roll(half, -1), torch.cat([-sin, sin], -1), value=sign)
    return turned if 2 * half == x.shape[-1] else torch.cat([turned, x[..., 2 * half :]], -1)
