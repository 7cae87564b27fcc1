"""Cut cross-entropy on a GPU: tiles of logits that never leave the registers.

Shapes: N tokens, D width, V vocabulary; tiles are ROWS x COLUMNS, products go STEP dimensions at a time.
Sums that several programs share are float32 atomics, so a gradient repeats up to the order of its sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, STEP = 64, 64, 32
SPLITS = 16  # programs that share the vocabulary of one block of tokens in the forward pass


@triton.jit
def _logits(
    H,
    W,
    B,
    rows,
    columns,
    N,
    V,
    D,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """float32 logits of `rows` x `columns`; what lies beyond N or V is 0 before the softcap."""
    tile = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for d in range(0, D, STEP):
        at = d + tl.arange(0, STEP)
        h = tl.load(H + rows[:, None] * D + at[None, :], mask=(rows < N)[:, None] & (at < D)[None, :], other=0.0)
        w = tl.load(W + columns[None, :] * D + at[:, None], mask=(columns < V)[None, :] & (at < D)[:, None], other=0.0)
        tile = tl.dot(h, w, tile, input_precision="ieee")
    if HAS_BIAS:
        tile += tl.load(B + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    if HAS_CAP:
        tile = softcap * (2.0 * tl.sigmoid(2.0 * tile / softcap) - 1.0)
    return tile


@triton.jit
def _lse_kernel(
    H,
    W,
    B,
    LSE,
    MEAN,
    N,
    V,
    D,
    softcap,
    per_split,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STATS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Log-sum-exp of one share of the vocabulary for one block of tokens, and the entries' summed logits."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    start = tl.program_id(1) * per_split
    peak = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for v in range(start, tl.minimum(start + per_split, V), COLUMNS):
        columns = (v + tl.arange(0, COLUMNS)).to(tl.int64)
        tile = _logits(H, W, B, rows, columns, N, V, D, softcap, HAS_BIAS, HAS_CAP, ROWS, COLUMNS, STEP)
        if STATS:
            seen = tl.where((rows < N)[:, None], tile, 0.0)
            tl.atomic_add(MEAN + columns, tl.sum(seen, 0), mask=columns < V)
        tile = tl.where((columns < V)[None, :], tile, -float("inf"))
        higher = tl.maximum(peak, tl.max(tile, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(tile - higher[:, None]), 1)
        peak = higher
    tl.store(LSE + tl.program_id(1) * N + rows, peak + tl.log(total), mask=rows < N)


@triton.jit
def _backward_kernel(
    H,
    W,
    B,
    TARGET,
    LSE,
    ORDER,
    DH,
    DW,
    DB,
    N,
    V,
    D,
    softcap,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile: its logits again, softmax minus target, and unless all of it is below eps the two products."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    if HAS_ORDER:
        columns = tl.load(ORDER + columns, mask=columns < V, other=V)
    tile = _logits(H, W, B, rows, columns, N, V, D, softcap, HAS_BIAS, HAS_CAP, ROWS, COLUMNS, STEP)
    lse = tl.load(LSE + rows, mask=rows < N, other=0.0)
    target = tl.load(TARGET + rows, mask=rows < N, other=-1)
    g = tl.exp(tile - lse[:, None]) - tl.where(target[:, None] == columns[None, :], 1.0, 0.0)
    g = tl.where((rows < N)[:, None] & (columns < V)[None, :], g, 0.0)
    # A NaN counts as large, so that it shows in the gradient.
    if tl.max(tl.max(tl.where(g == g, tl.abs(g), 2.0), 1), 0) >= eps:
        if HAS_CAP:
            g *= 1.0 - (tile / softcap) * (tile / softcap)
        if NEED_B:
            tl.atomic_add(DB + columns, tl.sum(g, 0), mask=columns < V)
        g = g.to(H.dtype.element_ty)
        for d in range(0, D, STEP):
            at = d + tl.arange(0, STEP)
            h_at = rows[:, None] * D + at[None, :]
            h_in = (rows < N)[:, None] & (at < D)[None, :]
            w_at = columns[:, None] * D + at[None, :]
            w_in = (columns < V)[:, None] & (at < D)[None, :]
            if NEED_H:
                w = tl.load(W + w_at, mask=w_in, other=0.0)
                tl.atomic_add(DH + h_at, tl.dot(g, w, input_precision="ieee"), mask=h_in)
            if NEED_W:
                h = tl.load(H + h_at, mask=h_in, other=0.0)
                tl.atomic_add(DW + w_at, tl.dot(tl.trans(g), h, input_precision="ieee"), mask=w_in)


def lse(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, stats: bool
) -> tuple[Tensor, Tensor | None]:
    """lse_N in float32, and with `stats` the mean logit of each entry of the vocabulary."""
    (N, D), V = h_ND.shape, len(weight_VD)
    h_ND, weight_VD = h_ND.contiguous(), weight_VD.contiguous()
    per_split = triton.cdiv(triton.cdiv(V, SPLITS), COLUMNS) * COLUMNS
    parts = torch.empty(triton.cdiv(V, per_split), N, dtype=torch.float32, device=h_ND.device)
    mean = torch.zeros(V, dtype=torch.float32, device=h_ND.device)
    if N:
        _lse_kernel[triton.cdiv(N, ROWS), len(parts)](
            h_ND,
            weight_VD,
            bias_V if bias_V is not None else h_ND,
            parts,
            mean,
            N,
            V,
            D,
            softcap or 1.0,
            per_split,
            bias_V is not None,
            softcap is not None,
            stats,
            ROWS,
            COLUMNS,
            STEP,
        )
    return parts.logsumexp(0), mean.div_(max(N, 1)) if stats else None


def backward(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    lse_N: Tensor,
    order_V: Tensor | None,
    softcap: float | None,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the summed loss in h, weight and bias, each in float32 where it is needed."""
    (N, D), V = h_ND.shape, len(weight_VD)
    h_ND, weight_VD = h_ND.contiguous(), weight_VD.contiguous()
    sizes: list[Any] = [(N, D), (V, D), (V,)]
    grads = [
        torch.zeros(size, dtype=torch.float32, device=h_ND.device) if need else None
        for size, need in zip(sizes, needs, strict=True)
    ]
    if N:
        _backward_kernel[triton.cdiv(N, ROWS), triton.cdiv(V, COLUMNS)](
            h_ND,
            weight_VD,
            bias_V if bias_V is not None else h_ND,
            targets_N.contiguous(),
            lse_N,
            order_V if order_V is not None else targets_N,
            *(g if g is not None else h_ND for g in grads),
            N,
            V,
            D,
            softcap or 1.0,
            eps,
            bias_V is not None,
            softcap is not None,
            order_V is not None,
            *needs,
            ROWS,
            COLUMNS,
            STEP,
        )
    return tuple(grads)
