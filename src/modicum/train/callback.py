"""Callbacks: hooks into the training loop, besides what a method's own port asks of it.

Optimizers, schedules, objectives, memory savers and surgery are callbacks, and so is whatever else is handed to
`train(parts=...)` (something that averages weights, a probe). Every hook does nothing unless filled, and gets the
`train.loop.Trainer`. Order of a run: `prepare`, (checkpoint loaded), `start`, then for each step:
`around` once per micro-batch, `before_step`, (clipping, optimizer), `after_step`; `finish` once, before the
last held-out loss. What `state_dict` gives goes into every checkpoint.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from modicum.core.errors import UserError

if TYPE_CHECKING:
    from modicum.train.engine import TrainEngine


class Callback:
    """No-op hooks. What a callback can be combined with is said in words (`core.compose`); one that fills
    `before_step` requires `step_gradients`."""

    provides: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset({"fsdp"})

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        """Change or replace the model before the optimizer is built and a checkpoint's weights are read.

        `state` is this part's saved state when the run is resumed, so that the shapes can be made to fit.
        """
        return model

    def stream_knobs(self) -> dict[str, Any]:
        """What the run's `data.stream.Stream` must be built with (`order`, `metadata`); see `check_stream`."""
        return {}

    def start(self, trainer: TrainEngine) -> None:
        """Everything is built and loaded; the first step follows."""

    def around(self, trainer: TrainEngine) -> contextlib.AbstractContextManager[Any]:
        """A context around forward and backward of one micro-batch."""
        return contextlib.nullcontext()

    def before_step(self, trainer: TrainEngine) -> None:
        """The step's gradients are summed (`trainer.named[name].grad`) and may be changed in place."""

    def after_step(self, trainer: TrainEngine) -> None:
        """A step is finished; `trainer.replace(model, ...)` may be called here."""

    def finish(self, trainer: TrainEngine) -> None:
        """The last step is finished; weights may still change here (averaging, for one)."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: a flat dict of tensors and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; tensors arrive whole and on the CPU."""


def check_stream(name: str, part: Callback, stream: Any) -> None:
    """Raise `UserError` if `stream` was not built as `part`, called `name`, asks."""
    for knob, wanted in part.stream_knobs().items():
        given = getattr(stream, knob, None)
        if given != wanted:
            raise UserError(
                f"{name} needs training data in a stream with {knob}={wanted!r}, and this one has {knob}={given!r}: "
                f"build it with Stream(..., {knob}={wanted!r}), as pretraining does, or choose another method"
            )


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON values) of a flat state dict."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return tensors, {k: v for k, v in state.items() if k not in tensors}


def join_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, **values}
