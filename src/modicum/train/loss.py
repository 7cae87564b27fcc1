"""Cross-entropy over large vocabularies, a slice of the logits at a time.

Shapes: B sequences, T tokens, N = B T rows, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from modicum.model import fused, native

CPU_BYTES, CPU_ROWS = 8 << 20, 128  # slices that stay in a CPU's cache, with rows enough for its matrix product
KERNEL_BYTES, KERNEL_ROWS = 16 << 20, 256  # the same where kernels make the gradient in one pass
CUDA_BYTES = 512 << 20
NO_LOSS = -100  # a target without loss, as in torch.nn.functional.cross_entropy
Head = Callable[[Tensor], Tensor]
CrossEntropy = Callable[[Tensor, Tensor, Head | None], tuple[Tensor, Tensor]]  # as `cross_entropy`
_OTHER: ContextVar[CrossEntropy | None] = ContextVar("cross_entropy", default=None)


@contextlib.contextmanager
def using(other: CrossEntropy) -> Iterator[None]:
    """Within the context `cross_entropy` computes gradients with `other` (a memory saver's)."""
    token = _OTHER.set(other)
    try:
        yield
    finally:
        _OTHER.reset(token)


def token_loss(model: nn.Module, batch: Any, *, logits_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of `batch.targets_BT` (nats, float32) and the number of targets.

    A decoder gives hidden states and head by themselves (`hidden`, `head`); any other module is called
    with the tokens and must give logits_BTV, or an object with `.logits`, and then knows no documents.
    """
    if hasattr(model, "hidden") and hasattr(model, "head"):
        decoder: Any = model
        h_BTD = decoder.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        return cross_entropy(h_BTD, batch.targets_BT, decoder.head, logits_bytes)
    out = model(batch.tokens_BT)
    return cross_entropy(getattr(out, "logits", out), batch.targets_BT, None, logits_bytes)


def cross_entropy(
    h_BTD: Tensor, targets_BT: Tensor, head: Head | None, logits_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(head(h))[target] over targets that are not NO_LOSS, and how many those are.

    head=None: `h_BTD` are the logits. Within `using` another function computes it; else `sliced`, with
    `logits_bytes`.
    """
    other = _OTHER.get()
    if other is not None and torch.is_grad_enabled():
        return other(h_BTD, targets_BT, head)
    return sliced(h_BTD, targets_BT, head, logits_bytes)


def sliced(
    h_BTD: Tensor, targets_BT: Tensor, head: Head | None, logits_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` by slices of rows: at most `logits_bytes` of float32 logits exist at once (None: see
    `slice_rows`). The gradient is computed slice by slice during the forward pass, so nothing is
    recomputed in the backward pass; it may be taken once, and not differentiated again.
    """
    h_ND, targets_N = h_BTD.flatten(0, -2), targets_BT.flatten()
    count = (targets_N != NO_LOSS).sum()
    if targets_N.device.type == "cpu" and type(targets_N) is Tensor and 0 < 2 * int(count) < len(targets_N):
        learnt = (targets_N != NO_LOSS).nonzero()[:, 0]  # most rows carry no loss: they need no logits either
        h_ND, targets_N = h_ND[learnt], targets_N[learnt]
    vocabulary, weights = (h_ND.shape[1], []) if head is None else _probe(head, h_ND)
    kernels = fused.ready(h_ND)
    rows = slice_rows(vocabulary, h_ND.device, logits_bytes, kernels=kernels)
    if not torch.is_grad_enabled():
        slices = zip(h_ND.split(rows), targets_N.split(rows), strict=True)
        return torch.stack([_slice_loss(h, t, head)[0] for h, t in slices]).sum(), count
    if kernels and len(targets_N) and int(targets_N.max()) >= vocabulary:
        raise IndexError(f"target {int(targets_N.max())} is outside of the {vocabulary} logits")
    return _Sliced.apply(h_ND, targets_N, head, rows, kernels, *weights), count


def slice_rows(vocabulary: int, device: torch.device, logits_bytes: int | None = None, *, kernels: bool = False) -> int:
    """Rows of logits at a time: what `logits_bytes` hold in float32, or by default what runs fast here."""
    if logits_bytes is not None:
        return max(1, logits_bytes // (4 * vocabulary))
    if kernels:  # two copies in half precision
        return max(KERNEL_ROWS, KERNEL_BYTES // (2 * vocabulary))
    if device.type == "cpu":
        return max(CPU_ROWS, CPU_BYTES // (4 * vocabulary))
    return max(CPU_ROWS, CUDA_BYTES // (4 * vocabulary))


def _slice_loss(h_ND: Tensor, targets_N: Tensor, head: Head | None) -> tuple[Tensor, ...]:
    """Loss sum, logits, log-probabilities (float32), target columns, mask, of one slice."""
    logits_NV = h_ND if head is None else head(h_ND)
    # Cast first: the kernel that casts on the way is ten times slower on a CPU.
    logp_NV = torch.log_softmax(logits_NV.detach().float(), -1)
    valid_N1 = (targets_N != NO_LOSS)[:, None]
    columns_N1 = targets_N.clamp_min(0)[:, None]
    loss = -torch.where(valid_N1, logp_NV.gather(1, columns_N1), 0.0).sum()
    return loss, logits_NV, logp_NV, columns_N1, valid_N1


class _Sliced(torch.autograd.Function):
    """d loss / d logits = softmax - onehot(target), pushed through the head slice by slice."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, targets_N: Tensor, head: Head | None, rows: int, kernels: bool, *weights: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=h_ND.device)
        grad_h = torch.empty_like(h_ND)
        grads: list[Tensor] = []
        several = rows < h_ND.shape[0]
        for start in range(0, h_ND.shape[0], rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                x = h_ND[part].detach().requires_grad_()
                # A view, because hooks of module trackers cannot stand on a leaf that autograd.grad asks for.
                loss, logits, delta = _slice_gradient(x.view_as(x), targets_N[part], head, kernels)
            total += loss
            if head is None:
                grad_h[part] = delta
                continue
            grad_h[part], *more = torch.autograd.grad(logits, (x, *weights), delta.to(logits.dtype))
            if not grads:
                grads = [g.float() if several else g for g in more]  # float32 while summing over slices
            else:
                _add(grads, more)
        ctx.grads = [grad_h, *(g.to(w.dtype) for g, w in zip(grads, weights, strict=True))]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        grad_h, *grads = (g * outer[0].to(g.dtype) for g in ctx.grads)
        del ctx.grads
        return grad_h, None, None, None, None, *grads


def _slice_gradient(h_ND: Tensor, targets_N: Tensor, head: Head | None, kernels: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum of one slice, its logits, the loss's gradient in them."""
    if kernels:
        logits = h_ND if head is None else head(h_ND)
        with torch.no_grad():
            loss_N, delta = native.cross_entropy(logits, targets_N)
        return loss_N.sum(), logits, delta
    loss, logits, logp, columns, valid = _slice_loss(h_ND, targets_N, head)
    delta = logp.exp_()
    delta.scatter_add_(1, columns, torch.full_like(columns, -1, dtype=delta.dtype))
    delta.mul_(valid)  # a masked fill takes ten times as long
    return loss, logits, delta


def _add(totals: list[Tensor], more: list[Tensor]) -> None:
    """Add to float32 sums; in one pass where a kernel may."""
    for total, one in zip(totals, more, strict=True):
        if native.can_accumulate(total, one):
            native.accumulate(total, one)
        else:
            total += one.float()


def _probe(head: Head, h_ND: Tensor) -> tuple[int, list[Tensor]]:
    """The vocabulary's size, and the tensors that train in the head, found in the graph of one row.

    Whatever the head is (tied, a form, an adapter), these are the leaves that its gradient must reach.
    """
    row = h_ND[:1].detach()
    logits = head(row)
    losses: list[Tensor] = []
    seen, stack = set(), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            losses.append(node.variable)
        stack.extend(following for following, _ in node.next_functions)
    return logits.shape[-1], losses
