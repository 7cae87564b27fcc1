"""port distiller: what a student learns from a teacher's outputs and states, beside the run's own objective.

A method is constructed as `cls(config)` and is a callback of the run. At its start it steps between the run and its
objective: the objective's forward pass is watched (`_teacher.watching`), the teacher sees the same tokens without
gradient, and the loss becomes

    total = keep * objective + sum of `terms`          count as the objective's

where each term is a *sum* over the batch's targets, so that the mean depends on no cut into micro-batches. A teacher
is a model folder or name; "" is the model as the run begins (a resumed run has the same). What a method trains beside
the model (`extra`: maps between widths, projectors) has an AdamW of its own, is kept in checkpoints and thrown away at
the end.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modicum.core.registry import Method
from modicum.train.callback import Callback
from modicum.train.distillers._teacher import Watched, frozen_copy, load_teacher, run_teacher, targets_mask, watching
from modicum.train.objectives import Loss, Objective, Step

BASELINE = "none"
HOOKS = ("around", "before_step", "step_factors", "after_step", "finish", "state_dict", "load_state_dict")


class Distiller(Method, Callback):
    """Base class: fill `terms`. keep: weight of the objective's own loss; at 0 it is not computed."""

    conflicts: ClassVar[frozenset[str]] = frozenset({"fsdp", "objective/ul2"})
    extra_rate: ClassVar[float] = 1e-3  # of AdamW on `extra`

    def __init__(self, config: Any):
        self.config = config
        self.teacher: Any = None
        self.extra: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: dict[str, Any] = {}

    @property
    def keep(self) -> float:
        return 1.0

    def teacher_layers(self, student: Any) -> tuple[int, ...]:
        """Layers of the teacher whose outputs `terms` reads."""
        return ()

    def student_layers(self, student: Any) -> tuple[int, ...]:
        """Layers of the student whose outputs `terms` reads."""
        return ()

    def make_extra(self, student: Any) -> nn.Module | None:
        """What is trained beside the model; the teacher is loaded."""
        return None

    @abstractmethod
    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        """Weighted sums over the tokens of `mask_BT`, float32 scalars with a graph, by name."""

    # the run ------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        if not self.config.teacher:
            self.teacher = frozen_copy(model)
        return model

    def start(self, trainer: Any) -> None:
        if not isinstance(trainer.objective, Taught):
            trainer.objective = Taught(trainer.objective, self)
        self.ready(trainer.model)

    def ready(self, student: Any) -> None:
        """Load the teacher and make what is trained beside the model, once."""
        if self.teacher is None:
            self.teacher = load_teacher(self.config.teacher, student) if self.config.teacher else frozen_copy(student)
        dtype, device = student.dtype, student.device
        for p in self.teacher.parameters():
            if p.is_floating_point():
                p.data = p.data.to(dtype)
        if self.teacher.device != device:
            self.teacher.to(device)
        if self._optimizer is None and (extra := self.make_extra(student)) is not None:
            self.extra = extra if device.type == "cpu" else extra.to(device)
            self._optimizer = torch.optim.AdamW(self.extra.parameters(), lr=self.extra_rate, weight_decay=0.0)
            if self._saved:
                self._restore(self._saved)

    def loss(self, objective: Objective, model: Any, batch: Any, step: Step) -> Loss:
        """The objective's loss with the teacher's terms."""
        self.ready(model)
        with watching(model, self.student_layers(model)) as seen:
            if self.keep:
                own = objective.loss(model, batch, step)
            else:
                model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
                own = Loss(torch.zeros((), device=batch.tokens_BT.device), (batch.targets_BT != -100).sum())
        mask_BT = targets_mask(seen, batch)
        taught = run_teacher(self.teacher, seen, self.teacher_layers(model))
        terms = self.terms(model, seen, taught, mask_BT)
        total = self.keep * own.total if self.keep else own.total
        for term in terms.values():
            total = total + term
        return Loss(total, own.count, own.metrics | {name: term.detach() for name, term in terms.items()})

    def after_step(self, trainer: Any) -> None:
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        if self.extra is None or self._optimizer is None:
            return {}
        state: dict[str, Any] = {f"extra.{name}": p.detach() for name, p in self.extra.named_parameters()}
        for name, p in self.extra.named_parameters():
            for key, value in self._optimizer.state.get(p, {}).items():
                state[f"{key}.{name}"] = value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = dict(state)

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        assert self.extra is not None and self._optimizer is not None
        for name, p in self.extra.named_parameters():
            p.copy_(state[f"extra.{name}"])
            moments = {k: state[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in state}
            if moments:
                self._optimizer.state[p] = {
                    k: v.clone().to(v.device if k == "step" else p.device) for k, v in moments.items()
                }


class Taught(Objective):
    """An objective whose loss a distiller adds to; every hook is the objective's."""

    def __init__(self, objective: Objective, distiller: Distiller):
        super().__init__(objective.config)
        self.objective, self.distiller, self.random = objective, distiller, objective.random  # type: ignore[misc]
        for hook in HOOKS:
            setattr(self, hook, getattr(objective, hook))

    def reserved(self) -> int:
        return self.objective.reserved()

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        return self.distiller.loss(self.objective, model, batch, step)
