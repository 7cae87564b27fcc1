"""Adam's two moments of one matrix, in float32 or in 8 bits: what low-memory optimizers share.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   ratio = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

The moments are tensors by name, so that they can go into a checkpoint as they are.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.train.optimizers._quantised import blocks_of, code_points, dequantise, quantise

FIELDS = (("exp_avg", True), ("exp_avg_sq", False))  # moment, and whether it has a sign


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Knobs of the ratio. bits: 32, or 8 with one scale for `block` values of a row."""

    beta1: float
    beta2: float
    eps: float
    bits: int = 32
    block: int = 2048

    def fresh(self, shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
        """Moments of zero for a matrix of this shape."""
        if self.bits == 32:
            return {name: torch.zeros(shape, device=device) for name, _ in FIELDS}
        buffers = {}
        for name, signed in FIELDS:
            zero = code_points(signed).index(0.0)
            buffers[name] = torch.full(shape, zero, dtype=torch.uint8, device=device)
            buffers[f"{name}_scale"] = torch.zeros(shape[0], blocks_of(shape[1], self.block), device=device)
        return buffers

    def ratio(self, g_RC: Tensor, buffers: dict[str, Tensor], t: int) -> Tensor:
        """Take gradient number `t` (from 1) into the moments, in place; the float32 ratio_RC."""
        g_RC = g_RC.float()
        if self.bits == 32:
            m, v = buffers["exp_avg"], buffers["exp_avg_sq"]
        else:
            m, v = (dequantise(buffers[name], buffers[f"{name}_scale"], self.block, signed) for name, signed in FIELDS)
        m.lerp_(g_RC, 1 - self.beta1)
        v.mul_(self.beta2).addcmul_(g_RC, g_RC, value=1 - self.beta2)
        if self.bits == 8:
            for (name, signed), value in zip(FIELDS, (m, v), strict=True):
                codes, scales = quantise(value, self.block, signed)
                buffers[name].copy_(codes)
                buffers[f"{name}_scale"].copy_(scales)
        below = v.sqrt().div_(math.sqrt(1 - self.beta2**t)).add_(self.eps)
        return m.div(1 - self.beta1**t).div_(below)

    def nbytes(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        if self.bits == 32:
            return 8 * rows * columns
        return 2 * rows * columns + 8 * rows * blocks_of(columns, self.block)


def flat(buffers: Mapping[str, Mapping[str, Tensor]], steps: Mapping[str, int]) -> dict[str, Any]:
    """Tensors by parameter and field, and its steps, as one state: `NAME:field`, `NAME:step`."""
    tensors = {f"{name}:{field}": value for name, fields in buffers.items() for field, value in fields.items()}
    return tensors | {f"{name}:step": steps[name] for name in buffers}


def parted(
    state: Mapping[str, Any], mine: Container[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int], dict[str, Any]]:
    """(tensors, steps) of the parameters in `mine`, as given to `flat`, and what else the state holds."""
    buffers: dict[str, dict[str, Tensor]] = {}
    steps: dict[str, int] = {}
    rest = {}
    for key, value in state.items():
        name, _, field = key.rpartition(":")
        if name not in mine:
            rest[key] = value
        elif field == "step":
            steps[name] = int(value)
        else:
            buffers.setdefault(name, {})[field] = value
    return buffers, steps, rest


def check_adam(beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """Refuse values that no Adam can have. Raises `ValueError`."""
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1={beta1} and beta2={beta2} must lie in [0, 1)")
    if eps <= 0 or weight_decay < 0:
        raise ValueError("eps must be positive and weight_decay must not be negative")


def check_bits(bits: int, block: int) -> None:
    if bits not in (8, 32):
        raise ValueError(f"bits={bits} must be 8 or 32")
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
