"""port memory: saves peak memory of a training step, in what is kept for the backward pass or in the loss.

A method is constructed as `cls(config)` and is a part of the run (train.part): `prepare` may change the model
before it trains (its forward pass must stay the same function of the same parameters, under the same names),
and `around` is a context for forward and backward of each micro-batch. A run may use several savers that act
on different things; two that act on the same are refused.

Words in `supports`:
    fsdp      works on sharded parameters
    compile   works when the layers are compiled
"""

from __future__ import annotations

from typing import Any, ClassVar

from modicum.core.registry import Method
from modicum.train.part import Part

BASELINE = "none"


class MemorySaver(Method, Part):
    """Base class: fill `around`, or `prepare`.

    saves: what the method acts on, "activations" or "loss". exact: gradients are those of the plain step, up
    to the order of floating-point sums; otherwise conformance allows `gradient_error`, the largest relative
    error of the whole gradient (2-norm).
    """

    supports: ClassVar[frozenset[str]] = frozenset()
    saves: ClassVar[str] = "activations"
    gradient_error: ClassVar[float] = 1e-5

    def __init__(self, config: Any):
        self.config = config
