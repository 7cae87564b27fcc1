"""port surgery: changes the model while it trains: sparsity, growth, pruning, on a schedule of its own.

A method is constructed as `cls(config)` and is a part of the run (train.callback). `prepare` may give another
model to begin with (shallower, masked), `before_step` may mask gradients, `after_step` may change weights or
go on with another model (`trainer.replace`), and `finish` leaves the model that is exported: the model that
the caller handed in holds the trained weights at the end.

What a method does at which step follows from its config, the length of the run and the model's shapes alone,
so that `marks`, `removed` and `flops` can tell of steps that are still to come: planners and benches ask them.

Unless a method says otherwise it conflicts with `fsdp` (sharded parameters) and with the port `linear` (linear forms
that hold the weights).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from modicum.core.registry import Method
from modicum.train.callback import Callback

if TYPE_CHECKING:
    from modicum.train.engine import TrainEngine

BASELINE = "none"


class Surgery(Method, Callback):
    """Base class: fill the hooks of `Callback` that the method needs, and what it tells of itself."""

    conflicts: ClassVar[frozenset[str]] = frozenset({"fsdp", "linear"})

    def __init__(self, config: Any):
        self.config = config

    def marks(self, trainer: TrainEngine) -> list[int]:
        """Steps of this run, in order, after which `after_step` makes it hold or execute something else."""
        return []

    def position(self, done: float, total: float) -> tuple[float, float]:
        """(done, total) in tokens that the schedule is asked for; a new course begins at done = 0."""
        return done, total

    def removed(self, step: int) -> int:
        """Weights of linear layers that are zero in step `step` (from 0), so that nothing is multiplied by them."""
        return 0

    def flops(self, trainer: TrainEngine, step: int) -> float:
        """Forward and backward FLOPs of a sequence in step `step`, as the papers count: two per weight that is
        not removed and per token forward, four backward. `trainer.row_flops` are those of its model as it
        stands with every weight multiplied, which is what plain dense kernels execute."""
        return trainer.row_flops - 6.0 * trainer.config.sequence_length * self.removed(step)
