"""The parts of a decoder layer: norm, attention, MLP, block.

Shapes: B batch, T tokens, D width, H query heads, G key/value heads, E head_dim, F MLP width, R rotated dims.
Every matrix product is a plain `nn.Linear`, so a method may replace any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modicum.model.attend import Attend
from modicum.model.config import DecoderConfig
from modicum.model.rope import rotate

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
Rotation = tuple[Tensor, Tensor] | None  # cos and sin, B1T(R/2)


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


class Attention(nn.Module):
    """Multi-head attention with shared key/value heads (Ainslie et al. 2023, arXiv:2305.13245).

    What a query may see, and where keys and values are kept, is the business of the `attend` it is given.
    """

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        c = config.per_layer[layer]
        self.layer, self.head_dim, self.qk_norm = layer, c.head_dim, c.qk_norm
        self.window, self.scale, self.softcap = c.window, c.attention_scale, c.attention_softcap
        heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.q = nn.Linear(config.width, heads, bias=c.qkv_bias)
        self.k = nn.Linear(config.width, kv, bias=c.qkv_bias)
        self.v = nn.Linear(config.width, kv, bias=c.qkv_bias)
        self.o = nn.Linear(heads, config.width, bias=c.o_bias)
        if self.qk_norm:
            per_head = self.qk_norm == "head"
            self.q_norm = make_norm(config, c.head_dim if per_head else heads)
            self.k_norm = make_norm(config, c.head_dim if per_head else kv)

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTE, k_BGTE, v_BGTE = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (q, k, v))
        if self.qk_norm == "head":
            q_BHTE, k_BGTE = self.q_norm(q_BHTE), self.k_norm(k_BGTE)
        if rotation is not None:
            q_BHTE, k_BGTE = rotate(q_BHTE, *rotation), rotate(k_BGTE, *rotation)
        out_BHTE = attend(
            self.layer, q_BHTE, k_BGTE, v_BGTE, window=self.window, scale=self.scale, softcap=self.softcap
        )
        return self.o(out_BHTE.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), or down(act(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        c = config.per_layer[layer]
        self.act, self.gated = ACTIVATION[c.activation], c.gated
        if c.gated:
            self.gate = nn.Linear(config.width, c.mlp_width, bias=c.mlp_bias)
        self.up = nn.Linear(config.width, c.mlp_width, bias=c.mlp_bias)
        self.down = nn.Linear(c.mlp_width, config.width, bias=c.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gated:
            return self.down(self.act(self.gate(x_BTD)) * self.up(x_BTD))
        return self.down(self.act(self.up(x_BTD)))


class Block(nn.Module):
    """One layer: attention and MLP around the residual stream, with norms where the config puts them."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.place, self.parallel = config.per_layer[layer].norm_place, config.per_layer[layer].parallel
        self.attention = Attention(config, layer)
        self.mlp = MLP(config, layer)
        if self.place in ("pre", "sandwich", "after"):
            self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)
        if self.place in ("output", "sandwich"):
            self.attention_out_norm, self.mlp_out_norm = make_norm(config), make_norm(config)

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = x_BTD
        if self.parallel:
            return x + self.attention(self.attention_norm(x), rotation, attend) + self.mlp(self.mlp_norm(x))
        if self.place == "pre":
            x = x + self.attention(self.attention_norm(x), rotation, attend)
            return x + self.mlp(self.mlp_norm(x))
        if self.place == "output":
            x = x + self.attention_out_norm(self.attention(x, rotation, attend))
            return x + self.mlp_out_norm(self.mlp(x))
        if self.place == "sandwich":
            x = x + self.attention_out_norm(self.attention(self.attention_norm(x), rotation, attend))
            return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.attention(x, rotation, attend))
        return self.mlp_norm(x + self.mlp(x))
