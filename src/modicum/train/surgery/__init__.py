"""port surgery: changes the model while it trains: sparsity, growth, pruning, on a schedule of its own.

A method is constructed as `cls(config)` and is a part of the run (train.part). `prepare` may give another
model to begin with (shallower, masked), `before_step` may mask gradients, `after_step` may change weights or
go on with another model (`trainer.replace`), and `finish` leaves the model that is exported: the model that
the caller handed in holds the trained weights at the end.

Words in `supports`:
    fsdp   works on sharded parameters
    form   works when linear forms hold the weights
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from modicum.core.registry import Method
from modicum.train.part import Part

BASELINE = "none"


class Surgery(Method, Part):
    """Base class: fill the hooks of `Part` that the method needs, and `flops`."""

    supports: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any):
        self.config = config

    def flops(self, model: nn.Module, dense: float) -> float:
        """Forward and backward FLOPs of a sequence as the paper counts them; `dense` are those of `model` as
        it stands, with every weight multiplied."""
        return dense
