"""A pre-norm layer's two halves as single autograd functions: x + o(attention(norm(x))) and x + down(swiglu(norm(x))).

What `model.fused` does operation by operation, with the projections of one input as one matrix product, rotation in
place, and gradients that pass beside the norm added where they are made. Norms and gated products are made again in the
backward pass, so a layer keeps its input, its queries, keys and values, what the heads give, and gate and up.

A projection is a dense weight, with or without a low-rank update (`LinearModule.products`):

    y = x W^T + s (x A^T) B^T

Anything else about a layer (another norm or activation, biases, other forms, hooks on its modules) leaves it to the
modules as written. Shapes: N rows, D width, O outputs, R rank; otherwise as in `model.fused`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from modicum.model import fused, native
from modicum.model.linear._module import LinearModule, Products
from modicum.model.native import products
from modicum.model.norms import RMSNorm

if TYPE_CHECKING:
    from modicum.model.layers import Block
    from modicum.model.mixers import Rotation


def run(block: Block, x_BTD: Tensor, rotation: Rotation, attend: Any) -> Tensor | None:
    """The layer's output, or None where its modules have to compute it."""
    if not fused.ready(x_BTD) or _has_any_global_hook():
        return None
    halves = _parts(block, x_BTD.dtype)
    if halves is None:
        return None
    attention, mlp = halves
    first = getattr(attend, "first_keys", lambda *_: None)(x_BTD.shape[1], block.attention.window)
    if first is None:
        return None
    if rotation is not None and not fused.can_rotate(x_BTD, rotation[0]):
        return None
    weight, eps = _norm(block.attention_norm)
    mixer: Any = block.attention
    heads = _Heads(mixer.head_dim, mixer.scale, eps)
    cos, sin = rotation or (None, None)
    x = _AttentionHalf.apply(x_BTD, weight, cos, sin, first, heads, _scales(attention), *_flat(attention))
    weight, eps = _norm(block.mlp_norm)
    return _MlpHalf.apply(x, weight, eps, _scales(mlp), *_flat(mlp))


def projected(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); as one autograd function over the kernels where it is a plain weight that nobody watches."""
    made = _products(layer, x.dtype) if fused.ready(x) and not _has_any_global_hook() else None
    return layer(x) if made is None or made.down_RI is not None else fused.linear(x, made.weight_OI)


# What a layer is made of ------------------------------------------------------------------------------


def _parts(block: Block, dtype: torch.dtype) -> tuple[list[Products], list[Products]] | None:
    """The projections q, k, v, o and gate, up, down; None unless the layer is of the kind computed here."""
    from modicum.model.layers import ACTIVATION
    from modicum.model.mixers.softmax import Softmax

    a, m = block.attention, block.mlp
    if type(a) is not Softmax or a.qk_norm or a.softcap is not None or a.pattern is not None:
        return None
    if not m.gated or m.act is not ACTIVATION["silu"] or a.head_dim % native.MULTIPLE:
        return None
    norms = (block.attention_norm, block.mlp_norm)
    if not all(type(n) is RMSNorm for n in norms) or not all(_untouched(n) for n in (*norms, a, m)):
        return None
    made = [_products(layer, dtype) for layer in (a.q, a.k, a.v, a.o, m.gate, m.up, m.down)]
    whole = [one for one in made if one is not None]
    if len(whole) < len(made) or whole[5].weight_OI.shape[0] % native.MULTIPLE:
        return None
    return whole[:4], whole[4:]


def _products(layer: nn.Module, dtype: torch.dtype) -> Products | None:
    if not all(_untouched(m) for m in layer.modules()):
        return None
    if type(layer) is nn.Linear:
        made = None if layer.bias is not None else Products(layer.weight)
    else:
        made = layer.products() if isinstance(layer, LinearModule) else None
    return made if made is not None and all(t.dtype == dtype for t in made.tensors()) else None


def _untouched(module: nn.Module) -> bool:
    """Whether nobody watches or replaces this module's forward pass."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks)


def _norm(norm: Any) -> tuple[Tensor, float]:
    return (1.0 + norm.weight.float() if norm.plus_one else norm.weight), norm.eps


def _scales(projections: Iterable[Products]) -> tuple[float | None, ...]:
    return tuple(one.scale if one.down_RI is not None else None for one in projections)


def _flat(projections: Iterable[Products]) -> list[Tensor]:
    return [t for one in projections for t in one.tensors()]


# Projections of one input -----------------------------------------------------------------------------


@dataclass
class _Group:
    """Projections of one input, as one product: weights one below the other, updates as one of all their ranks."""

    scales: Sequence[float | None]
    tensors: Sequence[Tensor]  # of each projection its weight, and A and B where it has an update
    needs: Sequence[bool]  # which of them have gradients

    def __post_init__(self) -> None:
        it = iter(range(len(self.tensors)))
        self.index = [(next(it), None, None) if s is None else (next(it), next(it), next(it)) for s in self.scales]
        self.weights = [self.tensors[w] for w, _, _ in self.index]
        self.sizes = [len(w) for w in self.weights]
        self.updated = any(s is not None for s in self.scales)

    def weight(self) -> Tensor:
        return self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)

    def _updates(self) -> Iterator[tuple[int, int, float, int, int]]:
        """Of each update: its first output and first rank, its scale, where A and B are."""
        row = rank = 0
        for size, scale, (_, a, b) in zip(self.sizes, self.scales, self.index, strict=True):
            if scale is not None and a is not None and b is not None:
                yield row, rank, scale, a, b
                rank += len(self.tensors[a])
            row += size

    def _down(self) -> Tensor:
        return torch.cat([self.tensors[a] for *_, a, _ in self._updates()])

    def _up(self) -> Tensor:
        """s B of all updates, (O, R), zero where one's outputs meet another's ranks."""
        updates = list(self._updates())
        ranks = sum(len(self.tensors[a]) for *_, a, _ in updates)
        up = self.weights[0].new_zeros(sum(self.sizes), ranks)
        for row, rank, scale, a, b in updates:
            B = self.tensors[b]
            torch.mul(B, scale, out=up[row : row + len(B), rank : rank + len(self.tensors[a])])
        return up

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """y_NO, and x A^T of the updates, which `backward` takes."""
        y = products.forward(x_ND, self.weight())
        if not self.updated:
            return y, None
        inner = products.forward(x_ND, self._down())
        return products.add(y, inner, self._up()), inner

    def back(self, grad_NO: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x, if wanted, and of x A^T."""
        inner = products.backward(grad_NO, self._up()) if self.updated else None
        if not wanted:
            return None, inner
        dx = products.backward(grad_NO, self.weight())
        return (dx if inner is None else products.add(dx, inner, self._down().t())), inner

    def gradients(
        self, x_ND: Tensor, inner_NR: Tensor | None, grad_NO: Tensor, dinner_NR: Tensor | None
    ) -> list[Tensor | None]:
        """Of the tensors; the first two are what `forward` took and gave, the others what `back` did."""
        made: list[Tensor | None] = [None] * len(self.tensors)
        if any(self.needs[w] for w, _, _ in self.index):
            whole = products.weight_gradient(grad_NO, x_ND).split(self.sizes)
            for (w, _, _), one in zip(self.index, whole, strict=True):
                made[w] = one if self.needs[w] else None
        if inner_NR is not None and dinner_NR is not None:
            down, up = products.weight_gradient(dinner_NR, x_ND), products.weight_gradient(grad_NO, inner_NR)
            for row, rank, scale, a, b in self._updates():
                ranks = slice(rank, rank + len(self.tensors[a]))
                made[a] = down[ranks] if self.needs[a] else None
                made[b] = up[row : row + len(self.tensors[b]), ranks] * scale if self.needs[b] else None
        return made


# The halves -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    size: int
    scale: float
    eps: float


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        first: Tensor,
        heads: _Heads,
        scales: tuple[float | None, ...],
        *tensors: Tensor,
    ) -> Tensor:
        x = x.contiguous()  # the later half gets what this gives
        B, T, D = x.shape
        qkv, o = _split(scales, tensors, [False] * len(tensors), 3)
        normed = native.norm(x, weight.float(), heads.eps)[0].view(-1, D)
        made, inner = qkv.forward(normed)
        q, k, v = _as_heads(made, qkv.sizes, B, heads.size)
        if cos is not None and sin is not None:
            for part in (q, k):
                native.rotate(part, cos, sin, out=part)
        out, lse = native.attention(q, k, v, first, heads.scale)
        rows = out.transpose(1, 2).reshape(B * T, -1)
        y, outer = o.forward(rows)
        ctx.save_for_backward(x, weight, cos, sin, first, made, rows, lse, inner, outer, *tensors)
        ctx.options = heads, scales
        return y.view(B, T, D).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin, first, made, rows, lse, inner, outer, *tensors = ctx.saved_tensors
        heads, scales = ctx.options
        B, T, D = x.shape
        grad = grad.contiguous()
        qkv, o = _split(scales, tensors, ctx.needs_input_grad[7:], 3)
        dout, douter = o.back(grad.view(-1, D))
        assert dout is not None
        d_o = o.gradients(rows, outer, grad.view(-1, D), douter)
        q, k, v = _as_heads(made, qkv.sizes, B, heads.size)
        out, dout = (y.view(B, T, -1, heads.size).transpose(1, 2) for y in (rows, dout))
        dmade = torch.empty_like(made)
        into = _as_heads(dmade, qkv.sizes, B, heads.size)
        native.attention_backward(q, k, v, out, lse, dout, first, heads.scale, into)
        if cos is not None:
            for part in into[:2]:
                native.rotate(part, cos, sin, -1.0, out=part)
        normed = native.norm(x, weight.float(), heads.eps)[0].view(-1, D)
        dx, dw, d_qkv = _through_norm(ctx, qkv, x, weight, heads.eps, normed, inner, dmade, grad)
        return dx, dw, None, None, None, None, None, *d_qkv, *d_o


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, scales: tuple[float | None, ...], *tensors: Tensor
    ) -> Tensor:
        D = x.shape[-1]
        inputs, down = _split(scales, tensors, [False] * len(tensors), 2)
        normed = native.norm(x, weight.float(), eps)[0].view(-1, D)
        both, inner = inputs.forward(normed)
        y, outer = down.forward(native.swiglu(*both.chunk(2, -1)))
        ctx.save_for_backward(x, weight, both, inner, outer, *tensors)
        ctx.options = eps, scales
        return y.view(x.shape).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, both, inner, outer, *tensors = ctx.saved_tensors
        eps, scales = ctx.options
        D, grad = x.shape[-1], grad.contiguous()
        inputs, down = _split(scales, tensors, ctx.needs_input_grad[4:], 2)
        rows = grad.view(-1, D)
        dproduct, douter = down.back(rows)
        assert dproduct is not None
        trained = down.updated or down.needs[0]
        gate, up = both.chunk(2, -1)
        dboth, product = native.swiglu_backward(gate, up, dproduct, product=trained)
        d_down = [None] if product is None else down.gradients(product, outer, rows, douter)
        normed = native.norm(x, weight.float(), eps)[0].view(-1, D)
        dx, dw, d_inputs = _through_norm(ctx, inputs, x, weight, eps, normed, inner, dboth, grad)
        return dx, dw, None, None, *d_inputs, *d_down


def _split(
    scales: tuple[float | None, ...], tensors: Sequence[Tensor], needs: Sequence[bool], several: int
) -> tuple[_Group, _Group]:
    """The projections into the half, and the one out of it."""
    first = sum(1 if s is None else 3 for s in scales[:several])
    return (
        _Group(scales[:several], tensors[:first], needs[:first]),
        _Group(scales[several:], tensors[first:], needs[first:]),
    )


def _as_heads(made: Tensor, sizes: Sequence[int], B: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (y.unflatten(-1, (-1, size)).transpose(1, 2) for y in made.view(B, -1, sum(sizes)).split(list(sizes), -1))
    return q, k, v


def _through_norm(
    ctx: Any,
    group: _Group,
    x: Tensor,
    weight: Tensor,
    eps: float,
    normed: Tensor,
    inner: Tensor | None,
    dmade: Tensor,
    grad: Tensor,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of a half's input (what passes beside the norm included), of the norm's weight, of the projections."""
    needs_x, needs_w = ctx.needs_input_grad[:2]
    dnormed, dinner = group.back(dmade, needs_x or needs_w)
    made = group.gradients(normed, inner, dmade, dinner)
    if dnormed is None:
        return None, None, made
    dx, dw = native.norm_backward(
        x, weight.float(), dnormed.view(x.shape), eps, add=grad if needs_x else None, dx=needs_x, dw=needs_w
    )
    return dx, None if dw is None else dw.to(weight.dtype), made
