"""cce: takes the cross-entropy a tile of the logits at a time and skips what cannot move the gradient.

The forward pass needs of all logits only their log-sum-exp per token and the one of the target; the backward
pass makes a tile of logits again, turns it into the softmax's gradient and multiplies it with weights and
hidden states. A tile whose gradients all lie below what the dtype resolves beside 1 is left out of both
products; sorting the vocabulary by mean logit gathers what is not negligible in few tiles.

    loss_n = logsumexp_v(h_n . w_v) - h_n . w_target(n)
    G_nv   = exp(h_n . w_v - lse_n) - [v = target(n)]         dh = G W,  dW = G^T h,  tile by tile
    skip a tile (`rows` tokens, `block` entries) if |G| < eps in all of it

Wijmans et al. 2024, arXiv:2411.09009, sections 4.1 to 4.3; kernels for GPUs in `_cce_triton`. Departs from the
paper: outside a GPU, in plain PyTorch, the forward pass also keeps each column's largest logit per `rows`
tokens, and a tile is skipped, without making its logits again, if that bound beside the rows' smallest
normaliser is below eps and no target lies in it; its logits are rounded to the model's dtype, as those of a
plain head are. Gradients are summed in float32 (in bf16 on a CPU with one more rounding per tile) instead of
bf16. `eps` follows the dtype: 2^-12 in bf16 as in the paper, 2^-28 in float32.
Shapes: N tokens with a loss, D width, V vocabulary, R blocks of tokens, J blocks of vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modicum.budget.trace import has_data
from modicum.core.errors import UserError
from modicum.model.linear import LinearForm
from modicum.model.wide import widened
from modicum.train import loss as losses
from modicum.train.memory import MemorySaver

CLAIM = {
    "figure": "loss and its gradients in 1.1 GB instead of 28 GB, as fast as the fastest plain one",
    "where": "Table 1",
    "scale": "Gemma 2 2B on one A100, 8,192 tokens, vocabulary of 256,000",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    eps: float | None = None  # gradients below it are skipped by tile; None: by dtype, 2^-12 in bf16; 0: none
    sort: bool = True  # vocabulary in order of mean logit, so that fewer tiles hold something
    rows: int = 512  # tokens of a tile outside a GPU (a GPU's are 64 and 64, in its registers)
    block: int = 1024  # vocabulary entries of a tile outside a GPU

    def __post_init__(self) -> None:
        if self.eps is not None and not 0 <= self.eps < 1:
            raise ValueError(f"eps={self.eps} must be at least 0 (skip nothing) and below 1, or left out")
        for name in ("rows", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Classifier:
    """What turns hidden states into logits: softcap(h W^T + b)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None


class Cce(MemorySaver):
    provides = frozenset({"loss_memory"})
    conflicts = frozenset({"loss_memory"})
    config: Config

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        classifier(model)  # refuses what it cannot take apart
        return model

    def around(self, trainer: Any) -> contextlib.AbstractContextManager[None]:
        return losses.using(partial(self.loss, trainer.model))

    def loss(self, model: Any, h_BTD: Tensor, targets_BT: Tensor, head: losses.Head | None) -> tuple[Tensor, Tensor]:
        """As `train.loss.cross_entropy`, which it leaves alone for a head that is not the model's own."""
        if head is None or head != model.head:
            return losses.sliced(h_BTD, targets_BT, head)
        return linear_cross_entropy(h_BTD, classifier(model), targets_BT, self.config)


def classifier(model: nn.Module) -> Classifier:
    """Weight, bias and softcap of a decoder's head. Raises `UserError` for a head that is not such."""
    if not (hasattr(model, "hidden") and hasattr(model, "head") and hasattr(model, "lm_head")):
        raise UserError(
            f"memory 'cce' cannot be combined with {type(model).__name__}, which gives logits and no hidden "
            "states and head; leave cce out"
        )
    decoder: Any = model
    layer, softcap = decoder.lm_head, decoder.config.logit_softcap
    if not isinstance(layer, LinearForm):
        return Classifier(layer.weight, layer.bias, softcap)
    if "merge" in layer.provides:
        weight_VD, bias_V = layer.dense(), layer.bias_value()
        if weight_VD.requires_grad or not any(p.requires_grad for p in layer.parameters()):
            return Classifier(weight_VD, bias_V, softcap)
    form = layer.choice.method if layer.choice else type(layer).__name__
    raise UserError(f"memory 'cce' cannot be combined with the form {form!r} on lm_head; leave one of them out")


def linear_cross_entropy(h_BTD: Tensor, head: Classifier, targets_BT: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(softcap(h W^T + b))[target] over targets that are not NO_LOSS, and their count.

    The sum is float32 (float64 for such input), differentiable once in h, weight and bias.
    """
    h_ND, targets_N = h_BTD.flatten(0, -2), targets_BT.flatten()
    valid_N = targets_N != losses.NO_LOSS
    count = valid_N.sum()
    if has_data(h_ND) and int(count) < len(valid_N):
        learnt = valid_N.nonzero()[:, 0]
        h_ND, targets_N = h_ND[learnt], targets_N[learnt]
    weight = head.weight_VD.to(h_ND.dtype)
    return _CutCrossEntropy.apply(h_ND, weight, head.bias_V, targets_N, head.softcap, config), count


class _CutCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        softcap: float | None,
        config: Config,
    ) -> Tensor:
        eps = torch.finfo(h_ND.dtype).eps / 32 if config.eps is None else config.eps
        way = _kernels() if h_ND.is_cuda else None
        outputs: tuple[Tensor, Tensor | None, Tensor | None]
        if way is not None:
            outputs = (*way.lse(h_ND, weight_VD, bias_V, softcap, eps > 0), None)
        else:
            with widened(h_ND):
                outputs = _lse(h_ND, weight_VD, bias_V, softcap, config, eps > 0)
        lse_N, mean_V, top_RV = outputs
        order_V = mean_V.argsort() if config.sort and mean_V is not None else None
        picked_N = (h_ND * weight_VD[targets_N]).sum(-1, dtype=lse_N.dtype)
        if bias_V is not None:
            picked_N = picked_N + bias_V[targets_N]
        if softcap is not None:
            picked_N = softcap * torch.tanh(picked_N / softcap)
        ctx.save_for_backward(h_ND, weight_VD, bias_V, targets_N, lse_N, order_V, top_RV)
        ctx.rest = softcap, config, eps, way
        return (lse_N - picked_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        h, weight, bias, targets, lse, order, top = ctx.saved_tensors
        softcap, config, eps, way = ctx.rest
        needs = ctx.needs_input_grad[:3]
        if way is not None:
            grads = way.backward(h, weight, bias, targets, lse, order, softcap, eps, needs)
        else:
            with widened(h):
                grads = _backward(h, weight, bias, targets, lse, order, top, softcap, config, eps, needs)
        # Scaled in place, while still in the dtype they were summed in.
        scaled = (None if g is None else g.mul_(outer.to(g.dtype)) for g in grads)
        made = (None if g is None else g.to(x.dtype) for g, x in zip(scaled, (h, weight, bias), strict=True))
        return *made, None, None, None


def _kernels() -> Any:
    """The Triton kernels, or None where Triton is not installed."""
    try:
        from modicum.train.memory import _cce_triton
    except ImportError:
        return None
    return _cce_triton


def _logits(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """A tile of logits, in float32 at least."""
    tile = (x_ND @ weight_VD.T).to(torch.promote_types(x_ND.dtype, torch.float32))
    if bias_V is not None:
        tile += bias_V
    return tile if softcap is None else tile.div_(softcap).tanh_().mul_(softcap)


def _lse(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, config: Config, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """lse_N; with `stats` each entry's mean logit (V) and its largest one among each `rows` tokens (R, V)."""
    (N, _), V = h_ND.shape, len(weight_VD)
    rows = [slice(n, min(n + config.rows, N)) for n in range(0, N, config.rows)]
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    peak_N = h_ND.new_full((N,), -math.inf, dtype=wide)
    sum_N, mean_V = (h_ND.new_zeros(size, dtype=wide) for size in (N, V))
    top_RV = h_ND.new_empty(len(rows), V, dtype=wide) if stats else None
    for v in range(0, V, config.block):
        columns = slice(v, min(v + config.block, V))
        weight, bias = weight_VD[columns], None if bias_V is None else bias_V[columns]
        for r, part in enumerate(rows):
            tile = _logits(h_ND[part], weight, bias, softcap)
            if top_RV is not None:
                mean_V[columns] += tile.sum(0)
                torch.amax(tile, 0, out=top_RV[r, columns])
            peak = torch.maximum(peak_N[part], tile.amax(1))
            shrunk = sum_N[part] * (peak_N[part] - peak).exp_()
            sum_N[part] = shrunk + tile.sub_(peak[:, None]).exp_().sum(1)
            peak_N[part] = peak
    return peak_N.add_(sum_N.log_()), mean_V if stats else None, top_RV


def _backward(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    lse_N: Tensor,
    order_V: Tensor | None,
    top_RV: Tensor | None,
    softcap: float | None,
    config: Config,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the summed loss in h and bias (wide), and in the weight (rounded once per entry)."""
    N, V, wide = len(h_ND), len(weight_VD), lse_N.dtype
    rows = [slice(n, min(n + config.rows, N)) for n in range(0, N, config.rows)]
    dh = torch.zeros_like(h_ND, dtype=wide) if needs[0] else None
    dw = torch.empty_like(weight_VD) if needs[1] else None
    db = h_ND.new_zeros(V, dtype=wide) if needs[2] else None
    rank_N = targets_N.clamp_min(0)  # where a target stands in the order
    valid_N1 = (targets_N != losses.NO_LOSS)[:, None]
    if order_V is not None:
        rank_N = torch.empty_like(order_V).scatter_(0, order_V, torch.arange(V, device=h_ND.device))[rank_N]
    wanted = _wanted(rank_N, lse_N, order_V, top_RV, config.rows, config.block, eps)
    for j, v in enumerate(range(0, V, config.block)):
        columns = slice(v, min(v + config.block, V))
        index = columns if order_V is None else order_V[columns]
        weight = weight_VD[columns] if order_V is None else weight_VD.index_select(0, order_V[columns])
        bias = None if bias_V is None else bias_V[index]
        sums_VD = torch.zeros_like(weight, dtype=wide)
        for r, part in enumerate(rows):
            if wanted is not None and not wanted[r][j]:
                continue
            tile = _logits(h_ND[part], weight, bias, softcap)
            slope = None if softcap is None else 1 - (tile / softcap).square_()
            g = tile.sub_(lse_N[part, None]).exp_()
            local = rank_N[part] - v
            here = ((local >= 0) & (local < len(weight)))[:, None]
            g.scatter_add_(1, local.clamp(0, len(weight) - 1)[:, None], -here.to(wide))
            g = g if slope is None else g.mul_(slope)
            if wanted is None:
                g = torch.where(valid_N1[part], g, 0.0)
            if db is not None:
                db[index] += g.sum(0)
            g = g.to(h_ND.dtype)
            if dh is not None:
                _add_product(dh[part], g, weight)
            if dw is not None:
                _add_product(sums_VD, g.T, h_ND[part])
        if dw is not None:
            rounded = sums_VD.to(dw.dtype)
            if order_V is None:
                dw[columns] = rounded
            else:
                dw.index_copy_(0, order_V[columns], rounded)
    return dh, dw, db


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)


def _wanted(
    rank_N: Tensor,
    lse_N: Tensor,
    order_V: Tensor | None,
    top_RV: Tensor | None,
    rows: int,
    block: int,
    eps: float,
) -> list[list[bool]] | None:
    """For R x J tiles, whether one can hold a gradient of `eps`; None where all must be taken.

    A tile without a target is judged by each column's largest logit beside the rows' smallest normaliser:
    that leaves out nothing which the paper's test of the tile itself would keep.
    """
    if top_RV is None or not has_data(lse_N):
        return None
    N, (R, V), J = len(lse_N), top_RV.shape, -(-top_RV.shape[1] // block)
    top_RV = top_RV if order_V is None else top_RV[:, order_V]
    top_RJ = nn.functional.pad(top_RV, (0, J * block - V), value=-math.inf).view(R, J, block).amax(2)
    least_R1 = nn.functional.pad(lse_N, (0, R * rows - N), value=math.inf).view(R, rows).amin(1, keepdim=True)
    # Not `>=`: what is compared with a NaN is wanted, so that it shows in the gradient.
    wanted_RJ = ~(top_RJ - least_R1 < math.log(eps))
    wanted_RJ[torch.arange(N, device=lse_N.device) // rows, rank_N // block] = True
    return wanted_RJ.tolist()
