"""Linear forms in training: attached before the first step, told of every step, kept in checkpoints."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from modicum.core.errors import UserError
from modicum.model import attach
from modicum.train.callback import Callback

if TYPE_CHECKING:
    from modicum.train.config import TrainConfig
    from modicum.train.engine import TrainEngine


M = TypeVar("M", bound=nn.Module)


class Forms(Callback):
    """The forms of the model that trains: those it has already, or `config.form` where `config.targets` say.

    What of a form is no parameter and no buffer (the rank that one has grown to, for one) is its layout,
    which checkpoints keep.
    """

    label = "the model's linear forms"

    def __init__(self, model: nn.Module):
        self.model = model
        kinds = {type(form) for form in attach.forms(model).values()}
        self.observes = any(attach.fills(kind, "before_step") for kind in kinds)
        self.provides = frozenset({"linear"}).union(*(kind.provides for kind in kinds))  # type: ignore[misc]
        self.requires = frozenset({"step_gradients"} if self.observes else ())  # type: ignore[misc]
        self.conflicts = frozenset().union(*(kind.conflicts for kind in kinds))  # type: ignore[misc]
        self.changes = any(attach.fills(kind, "after_step") for kind in kinds)

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        present = attach.forms(model)
        for name, layout in (state or {}).get("layouts", {}).items():
            present[name].set_layout(layout)
        return model

    def before_step(self, trainer: TrainEngine) -> None:
        if self.observes:
            with _masters(trainer):
                attach.before_step(self.model, trainer.gradient, trainer.steps_done + 1, trainer.config.total_steps)

    def after_step(self, trainer: TrainEngine) -> None:
        if self.changes:
            with _masters(trainer):
                attach.after_step(self.model, trainer.steps_done, trainer.config.total_steps)

    def state_dict(self) -> dict[str, Any]:
        layouts = {name: form.layout() for name, form in attach.forms(self.model).items()}
        return {"layouts": {name: layout for name, layout in layouts.items() if layout}}


def _masters(trainer: TrainEngine) -> contextlib.AbstractContextManager[None]:
    """Under bf16 training the forms see and change the float32 weights: what is done to bf16 ones is overwritten."""
    return trainer.masters.in_place() if trainer.masters else contextlib.nullcontext()


def merged(model: M) -> M:
    """`model`, changed in place: forms that are linear become plain layers, so that any program can read it."""
    if all("merge" in form.provides for form in attach.forms(model).values()):
        attach.merge(model)
    return model


def with_form(model: M, config: TrainConfig) -> M:
    """`model`, changed in place: `config.form`, if any, stands in the layers that `config.targets` name."""
    if config.form is None:
        return model
    generator = torch.Generator().manual_seed(config.seed)
    made = attach.attach(model, dict.fromkeys(config.targets, config.form), generator=generator)
    if not any(form.trainable() for form in made.values()):
        raise UserError(f"the form {config.form} trains nothing; choose one that does, such as lora:rank=8")
    return model
