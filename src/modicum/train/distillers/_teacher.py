"""A frozen teacher beside a student: what both compute for the same tokens, and divergences of their predictions.

The divergence is taken a slice of rows at a time, so that no second tensor of logits of the whole batch exists; its
gradient is computed slice by slice in the forward pass, as that of `train.loss`.

Shapes: B sequences, T tokens, N = B T rows, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modicum.budget.trace import has_data
from modicum.core.errors import UserError
from modicum.model.folder import load_config, load_model
from modicum.train.loss import NO_LOSS, _probe, slice_rows


@dataclass
class Watched:
    """One forward pass: its tokens and options, outputs of layers by index, and the final hidden states."""

    tokens_BT: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    layers: dict[int, Tensor] = field(default_factory=dict)
    h_BTD: Any = None


@contextlib.contextmanager
def watching(model: Any, layers: Sequence[int] = ()) -> Iterator[Watched]:
    """Record what `model.hidden` is given and gives inside, and the outputs of `layers`."""
    if not hasattr(model, "hidden") or not hasattr(model, "layers"):
        raise UserError(f"a teacher needs a decoder of modicum as its student, and {type(model).__name__} is none")
    seen, original = Watched(), model.hidden

    def hidden(tokens_BT: Tensor, **options: Any) -> Tensor:
        if seen.tokens_BT is not None:
            raise UserError("a distiller needs an objective of one forward pass; choose objective=next-token")
        seen.tokens_BT, seen.options = tokens_BT, options
        seen.h_BTD = original(tokens_BT, **options)
        return seen.h_BTD

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.layers[index] = output

        return hook

    handles = [model.layers[i].register_forward_hook(keep(i)) for i in layers]
    model.hidden = hidden
    try:
        yield seen
    finally:
        del model.hidden
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_teacher(teacher: Any, seen: Watched, layers: Sequence[int] = ()) -> Watched:
    """What the teacher computes for the tokens that a student saw."""
    with watching(teacher, layers) as taught:
        teacher.hidden(seen.tokens_BT, **seen.options)
    return taught


def targets_mask(seen: Watched, batch: Any) -> Tensor:
    """mask_BT: tokens that carry loss. Raises `UserError` where the objective made other rows out of the batch."""
    if seen.tokens_BT is not batch.tokens_BT:
        raise UserError(
            "a distiller compares predictions for the batch as it is, and the objective changed its tokens; choose "
            "objective=next-token or meco"
        )
    return batch.targets_BT != NO_LOSS


def frozen_copy(model: Any) -> Any:
    """The model as it is now, without gradients."""
    teacher = copy.deepcopy(model).eval()
    teacher.checkpoint_layers = False
    return teacher.requires_grad_(False)


def load_teacher(name: str, student: Any) -> Any:
    """The model of a folder or name, frozen; without data where the student has none (a plan). Raises `UserError`
    for another vocabulary."""
    shape = load_config(name)
    if shape.vocab_size != student.config.vocab_size:
        raise UserError(
            f"teacher {name} has {shape.vocab_size} tokens and the student {student.config.vocab_size}; a teacher must "
            "have the student's tokenizer: curate with --tokenizer of the teacher"
        )
    if has_data(next(student.parameters())):
        teacher: Any = load_model(name)
    else:
        from modicum.train.forecast import blank

        teacher = blank(shape)
    return teacher.eval().requires_grad_(False)


def map_layers(student: int, teacher: int) -> list[int]:
    """For each of `student` layers the index of the teacher's layer at the same part of its depth."""
    return [max(1, round((i + 1) * teacher / student)) - 1 for i in range(student)]


def divergence_N(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, *, reverse: bool = False, top: int = 0
) -> Tensor:
    """T^2 KL(teacher || student) of each row at temperature T, in nats; reverse: KL(student || teacher).

    top: only the teacher's likeliest tokens count, their probabilities renormalised; the student's over all tokens.
    """
    s_NV = torch.log_softmax(student_NV.float() / temperature, -1)
    t_NV = torch.log_softmax(teacher_NV.float() / temperature, -1)
    if top:
        t_NV, kept = t_NV.topk(min(top, t_NV.shape[-1]), -1)
        t_NV, s_NV = torch.log_softmax(t_NV, -1), s_NV.gather(-1, kept)
    if reverse:
        return temperature**2 * (s_NV.exp() * (s_NV - t_NV)).sum(-1)
    return temperature**2 * (t_NV.exp() * (t_NV - s_NV)).sum(-1)


def predictions_sum(
    student: Any,
    teacher: Any,
    h_BTD: Tensor,
    taught_BTD: Tensor,
    mask_BT: Tensor,
    of: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Sum over the tokens of `mask_BT` of `of(student's logits_NV, teacher's logits_NV)_N`, slice by slice."""
    h_ND, taught_ND, mask_N = h_BTD.flatten(0, -2), taught_BTD.flatten(0, -2), mask_BT.flatten()

    def slice_sum(x_ND: Tensor, start: int) -> Tensor:
        stop = start + len(x_ND)
        with torch.no_grad():
            teacher_NV = teacher.head(taught_ND[start:stop])
        return (of(student.head(x_ND), teacher_NV) * mask_N[start:stop]).sum()

    vocabulary, weights = _probe(student.head, h_ND)
    rows = slice_rows(vocabulary, h_ND.device)
    if not torch.is_grad_enabled():
        return torch.stack([slice_sum(x, i * rows) for i, x in enumerate(h_ND.split(rows))]).sum()
    total: Tensor = _Sliced.apply(h_ND, slice_sum, rows, *weights)
    return total


class _Sliced(torch.autograd.Function):
    """A sum over slices of rows, differentiated slice by slice while it is computed."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, slice_sum: Callable[[Tensor, int], Tensor], rows: int, *weights: Tensor
    ) -> Tensor:
        total, grad_h = torch.zeros((), device=h_ND.device), torch.empty_like(h_ND)
        sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        for start in range(0, len(h_ND), rows):
            with torch.enable_grad():
                x_ND = h_ND[start : start + rows].detach().requires_grad_()
                one = slice_sum(x_ND, start)
            grad_h[start : start + rows], *more = torch.autograd.grad(one, (x_ND, *weights))
            for into, grad in zip(sums, more, strict=True):
                into += grad
            total = total + one.detach().float()
        ctx.grads = [grad_h, *(s.to(w.dtype) for s, w in zip(sums, weights, strict=True))]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        grad_h, *grads = (g * outer[0].to(g.dtype) for g in ctx.grads)
        del ctx.grads
        return grad_h, None, None, *grads


def square_sum(x_BTD: Tensor, target_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the tokens of `mask_BT` of the mean over the width of (x - target)^2, float32."""
    return ((x_BTD.float() - target_BTD.float()).square().mean(-1) * mask_BT).sum()
