"""Linear forms in training: attached before the first step, kept in checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from modicum.core.errors import UserError
from modicum.model import attach
from modicum.train.callback import Callback

if TYPE_CHECKING:
    from modicum.train.config import TrainConfig


M = TypeVar("M", bound=nn.Module)


class Forms(Callback):
    """The forms of the model that trains: those it has already, or `config.form` where `config.targets` say.

    What of a form is no parameter and no buffer (the rank that one has grown to, for one) is its layout,
    which checkpoints keep. What forms do around a step is in callbacks of their own (`attach.callbacks`).
    """

    label = "the model's linear forms"

    def __init__(self, model: nn.Module):
        self.model = model
        kinds = {type(form) for form in attach.forms(model).values()}
        self.provides = frozenset({"linear"}).union(*(kind.provides for kind in kinds))  # type: ignore[misc]
        self.requires = frozenset().union(*(kind.requires for kind in kinds))  # type: ignore[misc]
        self.conflicts = frozenset().union(*(kind.conflicts for kind in kinds))  # type: ignore[misc]

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        present = attach.forms(model)
        for name, layout in (state or {}).get("layouts", {}).items():
            present[name].set_layout(layout)
        return model

    def state_dict(self) -> dict[str, Any]:
        layouts = {name: form.layout() for name, form in attach.forms(self.model).items()}
        return {"layouts": {name: layout for name, layout in layouts.items() if layout}}


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
    made = attach.attach(model, dict.fromkeys(config.targets or (), config.form), generator=generator)
    if not any(form.trainable() for form in made.values()):
        raise UserError(f"the form {config.form} trains nothing; choose one that does, such as lora:rank=8")
    return model
