"""increlora: low-rank updates that start at rank 1 and grow where the loss is most sensitive.

Every matrix starts with a rank-one update. Training keeps a smoothed sensitivity of each whole update, and its
uncertainty; at intervals the matrices that score highest get more ranks, until all have used up a total of `rank` per
matrix on average. New ranks start with lambda at zero, so that the function stays as it was, and with a warm-up of
their own; the vectors of the next ones are learnt in advance. A regulariser keeps the vectors orthonormal.

    y = base(x) + s B diag(lambda) A x,                  A in R^{r x I},  B in R^{O x r},  s = alpha / rank
    I_t = mean |dW * dL/d(dW)| over the entries of dW = s B diag(lambda) A
    S_t = beta1 S_{t-1} + (1 - beta1) I_t,   U_t = beta2 U_{t-1} + (1 - beta2) |I_t - S_t|,   score = S_t U_t
    R = gamma / 2M * sum over M matrices of ||A A^T - 1||^2 + ||B^T B - 1||^2

Zhang et al. 2023, arXiv:2308.12043, section 3 (parameterisation, allocation, advance learning, restart of the warm-up);
the smoothing is AdaLoRA's (Zhang et al. 2023, arXiv:2303.10512, section 3.2).
Departs from the paper: it gives begin and interval in steps and the number of matrices for each task; here they are
shares of the run, so that the budget is spent whatever the length. Ranks are reserved, `max_rank` to a matrix, so
that optimizers and checkpoints see tensors of one size; a new rank's moments start from zero without a bias
correction of their own. lambda of a rank learnt in advance acts on gradients alone, so nothing but the ranks of the
budget is in the function. The authors' code divides by the rank that a matrix has reached; s is constant here, since a
new rank would otherwise change the function. Over micro-batches, sensitivities are added up.
With lambda at zero and orthonormal vectors the update starts more slowly than LoRA's, which shows in short runs: give
it two or three times LoRA's learning rate.
Once training is over the form settles into plain `lora` of the rank reached. While the rank grows, a step costs one
more product of the size of the layer's own (the gradient of dW), which is taken apart into blocks of rows.

Shapes: R reserved ranks, N rows of inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.core.callback import Callback
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.linear import LinearForm, LinearShape, lora
from modicum.model.linear._adapter import Adapter
from modicum.model.wide import widened

CLAIM = {
    "figure": "better than LoRA and AdaLoRA at equal parameters, most of all with little data",
    "where": "abstract; GLUE",
    "scale": "DeBERTaV3-base 184M",
}
SWEEP = {"rank": (8,)}
BLOCK = 1 << 22  # entries of dL/d(dW) that are there at once
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: Annotated[int, Field(ge=1)] = 8  # that matrices have on average in the end
    max_rank: Annotated[int, Field(ge=0)] = 0  # that one of them can reach, and reserves; 0: 2 rank
    alpha: Annotated[float, Field(gt=0)] = 16.0  # scale of the update: alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # on the input of the update, while training
    add: Annotated[int, Field(ge=0)] = 0  # ranks that a chosen matrix gets at once; 0: half of rank
    begin: Share = 0.05  # share of the run after which ranks are first added
    interval: Annotated[float, Field(gt=0, le=1)] = 0.04  # share of the run between two additions
    end: Share = 0.5  # share of the run when all ranks have been added
    warmup: Share = 0.02  # share of the run over which a new rank's rate rises
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.85  # smoothing of the sensitivity
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.85  # smoothing of its uncertainty
    gamma: Annotated[float, Field(ge=0)] = 0.1  # weight of the regulariser
    ahead: Annotated[float, Field(ge=0)] = 1e-5  # lambda by which the next ranks learn in advance; 0: they do not
    std: Annotated[float, Field(gt=0)] = 0.02  # A and B start from N(0, std^2)

    def __post_init__(self) -> None:
        if 0 < self.max_rank < self.rank:
            raise ValueError(f"max_rank={self.max_rank} must be at least rank={self.rank}, or 0 for twice as many")
        if self.begin > self.end:
            raise ValueError(f"begin={self.begin} must not be after end={self.end}")

    @property
    def step_ranks(self) -> int:
        return self.add or max(1, self.rank // 2)


TOY = Config(rank=2, max_rank=4, alpha=4.0, begin=0.0, end=0.7, interval=0.3)


class IncreLora(Adapter):
    provides = frozenset({"adapter", "fit", "merge", "trainable"})
    requires = frozenset({"step_gradients"})
    config: Config

    def __init__(self, config: Config, shape: LinearShape, base: LinearForm):
        most = min(shape.in_features, shape.out_features)
        if max(config.rank, config.max_rank) > most:
            knob = f"rank={config.rank}" if config.rank > most else f"max_rank={config.max_rank}"
            raise UserError(
                f"increlora: {knob} is larger than the matrix {shape.out_features} x "
                f"{shape.in_features}; give {knob.split('=')[0]} <= {most}"
            )
        super().__init__(config, shape, base)
        self.most = min(config.max_rank or 2 * config.rank, most)
        self.A = nn.Parameter(self._empty(self.most, shape.in_features))
        self.B = nn.Parameter(self._empty(shape.out_features, self.most))
        self.E = nn.Parameter(self._empty(self.most))  # lambda
        self.scaling = config.alpha / config.rank
        # What it has grown to; all of it is in the layout.
        self.rank, self.growing = 1, config.rank > 1  # growing: some of the budget is left
        self.sensitivity = self.uncertainty = 0.0
        self.born, self.grown = [0] * self.most, [0] * self.most  # steps since which A and B, lambda of a rank learn
        self.score: Tensor | None = None  # of the step in progress

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.A, std=self.config.std, generator=generator)
        nn.init.normal_(self.B, std=self.config.std, generator=generator)
        nn.init.zeros_(self.E)

    @property
    def learning(self) -> int:
        """Ranks that have a gradient: those in use, and the next ones, which learn in advance."""
        ahead = self.config.step_ranks if self.growing and self.config.ahead else 0
        return min(self.rank + ahead, self.most)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x = F.dropout(x.to(self.A.dtype), self.config.dropout, self.training)
        a_RI, b_OR, _ = self.low_rank()
        if not (self.growing and self.training and torch.is_grad_enabled()):
            return y + (self.scaling * F.linear(F.linear(x, a_RI), b_OR)).to(y.dtype)
        z = F.linear(x, self.A[: self.learning])
        update = self.scaling * F.linear(z[..., : self.rank], b_OR)
        if self.learning > self.rank:
            update = _Ahead.apply(
                update, z[..., self.rank :], self.B[:, self.rank : self.learning], self.scaling * self.config.ahead
            )
        return y + _Watch.apply(update, x, self).to(y.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.A[: self.rank], self.B[:, : self.rank] * self.E[: self.rank], self.scaling

    def trainable(self) -> list[nn.Parameter]:
        return [self.A, self.B, self.E]

    def settled(self) -> Adapter:
        """Plain `lora` of the rank reached."""
        config = lora.Config(rank=self.rank, alpha=self.scaling * self.rank, dropout=self.config.dropout)
        form = lora.Lora(config, self.shape, self.base)
        form.choice = Choice("linear", "lora", dataclasses.asdict(config))
        a_RI, b_OR, _ = self.low_rank()
        form.A.data, form.B.data = a_RI.detach().clone(), b_OR.detach().clone()
        form._like = self._like
        return form

    def layout(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "growing": self.growing,
            "sensitivity": self.sensitivity,
            "uncertainty": self.uncertainty,
            "born": list(self.born),
            "grown": list(self.grown),
        }

    def set_layout(self, layout: dict[str, Any]) -> None:
        if layout:
            self.rank, self.growing = int(layout["rank"]), bool(layout["growing"])
            self.sensitivity, self.uncertainty = float(layout["sensitivity"]), float(layout["uncertainty"])
            self.born, self.grown = list(layout["born"]), list(layout["grown"])
            if not 1 <= self.rank <= self.most or not len(self.born) == len(self.grown) == self.most:
                raise ValueError(f"increlora: rank {self.rank} of at most {self.most} is stored")

    # --- as it grows -----------------------------------------------------------------------------

    @classmethod
    def callback(cls, forms: Mapping[str, LinearForm]) -> Callback:
        return Growth({name: form for name, form in forms.items() if isinstance(form, IncreLora)})

    def observe(self, sensitivity: float) -> None:
        """Take in the sensitivity of a step."""
        self.score = None
        if math.isfinite(sensitivity):  # a step that was skipped says nothing
            beta1, beta2 = self.config.beta1, self.config.beta2
            self.sensitivity = beta1 * self.sensitivity + (1 - beta1) * sensitivity
            self.uncertainty = beta2 * self.uncertainty + (1 - beta2) * abs(sensitivity - self.sensitivity)

    def grow(self, ranks: int, step: int) -> None:
        """Ranks learnt in advance come into use, and the next ones begin to learn."""
        self.grown[self.rank : self.rank + ranks] = [step] * ranks
        before = self.learning
        self.rank += ranks
        self.born[before : self.learning] = [step] * (self.learning - before)

    def warm_up(self, step: int, total: int) -> dict[str, Tensor]:
        """Shares of their learning rate that ranks have in `step`, by parameter; {} once all have their own."""
        steps = max(self.config.warmup * total, 1e-9)
        learnt, used = (
            [1.0 if since == 0 else min(1.0, (step - since) / steps) for since in of] for of in (self.born, self.grown)
        )
        if min(*learnt, *used) == 1:
            return {}
        rate_R = self.E.new_tensor(learnt)
        return {"A": rate_R[:, None], "B": rate_R, "E": self.E.new_tensor(used)}


class Growth(Callback):
    """Around the optimizer's step, for all matrices together: the regulariser, warm-ups, scores, new ranks."""

    requires = frozenset({"step_gradients"})

    def __init__(self, forms: Mapping[str, IncreLora]):
        self.forms = forms

    @torch.no_grad()
    def before_step(self, trainer: Any) -> None:
        for name, form in self.forms.items():
            n, pull = form.learning, 4 * form.config.gamma / (2 * len(self.forms))
            whole_a, whole_b = trainer.named[f"{name}.A"], trainer.named[f"{name}.B"]
            a_RI, b_OR = whole_a[:n], whole_b[:, :n]
            one_RR = torch.eye(n, dtype=a_RI.dtype, device=a_RI.device)
            if whole_a.grad is not None and whole_b.grad is not None:
                whole_a.grad[:n].add_((a_RI @ a_RI.T - one_RR) @ a_RI, alpha=pull)
                whole_b.grad[:, :n].add_(b_OR @ (b_OR.T @ b_OR - one_RR), alpha=pull)

    def step_factors(self, trainer: Any) -> dict[str, Tensor]:
        step, total = trainer.steps_done + 1, trainer.config.total_steps
        return {f"{name}.{key}": x for name, form in self.forms.items() for key, x in form.warm_up(step, total).items()}

    def after_step(self, trainer: Any) -> None:
        watched = [form for form in self.forms.values() if form.score is not None]
        if watched:
            scores = torch.stack([form.score for form in watched if form.score is not None]).tolist()
            for form, score in zip(watched, scores, strict=True):
                form.observe(score)
        for config in dict.fromkeys(form.config for form in self.forms.values()):
            mine = [form for form in self.forms.values() if form.config == config]
            allocate(mine, config, trainer.steps_done, trainer.config.total_steps)


def planned(config: Config, matrices: int, step: int, total: int) -> int:
    """Ranks that `matrices` have together after `step`: from one each to `config.rank` each, in equal parts."""
    rounds = int((config.end - config.begin) / config.interval + 1e-9) + 1
    since = step - config.begin * total
    done = 0 if since < 0 else min(rounds, int(since / (config.interval * total) + 1e-9) + 1)
    return matrices + math.ceil(matrices * (config.rank - 1) * done / rounds)


def allocate(forms: Sequence[IncreLora], config: Config, step: int, total: int) -> None:
    """Give the ranks that are due to the forms that score highest, `config.step_ranks` to each of them."""
    left = planned(config, len(forms), step, total) - sum(form.rank for form in forms)
    for form in sorted(forms, key=lambda form: -form.sensitivity * form.uncertainty):
        ranks = min(config.step_ranks, form.most - form.rank, left)
        if ranks > 0:
            form.grow(ranks, step)
            left -= ranks
    if sum(form.rank for form in forms) >= config.rank * len(forms):
        for form in forms:
            form.growing = False


class _Ahead(torch.autograd.Function):
    """y, as if `scale` z B^T were added to it in the backward pass, but not in the forward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(z, b_OR)
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        z, b_OR = ctx.saved_tensors
        grad_NO, z_NR = grad.reshape(-1, grad.shape[-1]), z.reshape(-1, z.shape[-1])
        with widened(grad):
            return grad, ctx.scale * (grad @ b_OR), ctx.scale * (grad_NO.T @ z_NR), None


class _Watch(torch.autograd.Function):
    """y = x dW^T as it is; its backward pass notes the sensitivity of dW in the form's `score`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, form: IncreLora) -> Tensor:
        ctx.save_for_backward(x)
        ctx.form = form
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        form: IncreLora = ctx.form
        with torch.no_grad(), widened(grad):
            a_RI, b_OR, scaling = form.low_rank()
            grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            rows = max(1, BLOCK // form.in_features)
            total = torch.zeros((), dtype=torch.float32, device=x.device)
            for g_NO, part_OR in zip(grad_NO.split(rows, 1), b_OR.split(rows), strict=True):
                total += (g_NO.T @ x_NI * (part_OR @ a_RI)).abs().sum(dtype=torch.float32)
            total *= scaling / (form.in_features * form.out_features)
            form.score = total if form.score is None else form.score + total
        return grad, None, None
