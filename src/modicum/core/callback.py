"""Callbacks: hooks into the training loop, for methods of any room.

Optimizers, schedules, objectives, memory savers, surgery and averaging are callbacks, linear forms may bring one, and
so is whatever else is handed to `train(parts=...)` (a probe). Every hook does nothing unless filled, and gets the
`train.engine.TrainEngine`. Order of a run: `prepare`, (checkpoint loaded), `start`, then for each step:
`around` once per micro-batch, `before_step`, (clipping), `step_factors`, (optimizer), `after_step`; `finish` once,
before the last held-out loss. What `state_dict` gives goes into every checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn


class Callback:
    """No-op hooks. What a callback can be combined with is said in words (`core.compose`); one that fills
    `before_step` or `step_factors` requires `step_gradients`."""

    provides: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset({"fsdp"})

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        """Change or replace the model before the optimizer is built and a checkpoint's weights are read.

        `state` is this part's saved state when the run is resumed, so that the shapes can be made to fit.
        """
        return model

    def start(self, trainer: Any) -> None:
        """Everything is built and loaded; the first step follows."""

    def around(self, trainer: Any) -> contextlib.AbstractContextManager[Any]:
        """A context around forward and backward of one micro-batch."""
        return contextlib.nullcontext()

    def before_step(self, trainer: Any) -> None:
        """The step's gradients are summed (`trainer.named[name].grad`) and may be changed in place."""

    def step_factors(self, trainer: Any) -> Mapping[str, Tensor]:
        """By parameter name, what the optimizer's change of it is multiplied with: learning rates of its rows, columns
        or entries (any shape that broadcasts to the parameter's)."""
        return {}

    def after_step(self, trainer: Any) -> None:
        """A step is finished; `trainer.replace(model, ...)` may be called here."""

    def finish(self, trainer: Any) -> None:
        """The last step is finished; weights may still change here (averaging, for one)."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: a flat dict of tensors and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; tensors arrive whole and on the CPU."""


def step_with_factors(step: Callable[[], None], named: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    """Call `step`, which changes the tensors of `named`, and keep of each change the part that `factors` say."""
    before = {name: named[name].detach().clone() for name in factors}
    step()
    for name, old in before.items():
        weight = named[name].detach()  # the same memory
        weight.copy_(old.lerp(weight, factors[name].to(weight).expand_as(weight)))
