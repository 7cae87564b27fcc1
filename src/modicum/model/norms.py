"""Norms over the residual stream, and over queries and keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modicum.model import fused
from modicum.model.config import DecoderConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    With `plus_one` the weight is stored minus one, as Gemma does.
    """

    def __init__(self, size: int, eps: float, plus_one: bool = False):
        super().__init__()
        self.eps, self.plus_one = eps, plus_one
        self.weight = nn.Parameter(torch.zeros(size) if plus_one else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float() if self.plus_one else self.weight
        if fused.ready(x):
            return fused.norm(x, weight, self.eps)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return _RMSNorm.apply(x, weight, self.eps)
        return _rms_norm(x, weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}" + (", plus_one" if self.plus_one else "")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The library's CPU backward pass is slow and keeps float32 copies; this one keeps the input itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        size, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        unit, g = x.reshape(-1, size).to(wide), grad.reshape(-1, size).to(wide)
        length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        scale = length.square_().div_(size).add_(ctx.eps).rsqrt_()
        unit = unit * scale  # x / rms(x)
        dweight = (g * unit).sum(0)
        g = g * weight.to(wide)
        dx = g.addcmul_(unit, (g * unit).mean(-1, keepdim=True), value=-1).mul_(scale)
        return dx.to(x.dtype).view_as(x), dweight.to(weight.dtype), None


def make_norm(config: DecoderConfig, size: int | None = None) -> nn.Module:
    size = size or config.width
    if config.norm == "layer":
        return nn.LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps, plus_one=config.norm == "rms_plus_one")
