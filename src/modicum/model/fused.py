"""Autograd functions over the kernels of `model.native`: what training in bfloat16 on a CPU takes for plain PyTorch.

`ready(x)` says whether it may: gradients are wanted, x is a bfloat16 tensor on a CPU, and nothing looks at the
operations (a compiler, a counter of FLOPs, a planner without data). Float32 stays with the plain path, which is what
these are tested against, and so does whatever `ready` refuses. Each function does its arithmetic in float32 and rounds
once; it keeps its inputs alone for the backward pass, and may be differentiated once.

Shapes: B batch, T tokens, H query heads, G key/value heads, E head_dim, D width, F MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from modicum.model import native
from modicum.model.native import products

DTYPES = {torch.bfloat16}  # that take the kernels; tests add float32


def ready(x: Tensor) -> bool:
    """Whether the kernels may compute with `x`, whose last dimension they take in vectors."""
    return (
        x.dtype in DTYPES
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.shape[-1] % native.MULTIPLE == 0
        and x.numel() > 0
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and native.library() is not None
    )


def norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight."""
    return _Norm.apply(x, weight_D, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return native.norm(x, weight.float(), eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[:2]
        dx, dw = native.norm_backward(x, weight.float(), grad, ctx.eps, dx=needs_x, dw=needs_w)
        return dx, None if dw is None else dw.to(weight.dtype), None


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T."""
    return _Linear.apply(x, weight_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return products.forward(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[:2]
        grad_NO = grad.reshape(-1, grad.shape[-1])
        dx = products.backward(grad_NO, weight).view(x.shape) if needs_x else None
        return dx, products.weight_gradient(grad_NO, x.reshape(-1, x.shape[-1])) if needs_w else None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return native.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        both, _ = native.swiglu_backward(gate, up, grad)
        return both.chunk(2, -1)


def can_rotate(x_BHTE: Tensor, cos: Tensor) -> bool:
    return ready(x_BHTE) and cos.dtype == x_BHTE.dtype and cos.shape[-1] % native.MULTIPLE == 0


def attend(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, first_BT: Tensor, scale: float) -> Tensor:
    """Causal attention of queries to the keys from `first_BT` (int32, B or 1 rows) to themselves: out_BHTE."""
    return _Attend.apply(q_BHTE, k_BGTE, v_BGTE, first_BT, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> Tensor:
        out, lse = native.attention(q, k, v, first, scale)
        ctx.save_for_backward(q, k, v, out, lse, first)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, first = ctx.saved_tensors
        return *native.attention_backward(q, k, v, out, lse, grad, first, ctx.scale), None, None


def first_keys(T: int, window: int | None, documents_BT: Tensor | None) -> Tensor | None:
    """The first key that each query of causal attention sees, int32 (B or 1, T).

    None where documents do not lie one after another, so that what is seen is no span. Padding (-1) counts as one.
    """
    index_1T = torch.arange(T, dtype=torch.int32)[None]
    first = torch.zeros_like(index_1T)
    if documents_BT is not None:
        number = torch.where(documents_BT < 0, torch.iinfo(torch.int32).max, documents_BT)
        if bool((number[:, 1:] < number[:, :-1]).any()):
            return None
        starts = torch.ones_like(number, dtype=torch.bool)
        starts[:, 1:] = number[:, 1:] != number[:, :-1]
        first = torch.where(starts, index_1T, 0).cummax(dim=1).values
    if window is not None:
        first = torch.maximum(first, index_1T - (window - 1))
    return first.to(torch.int32).contiguous()
