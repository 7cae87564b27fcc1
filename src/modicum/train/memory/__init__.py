"""port memory: saves peak memory of a training step, in what is kept for the backward pass or in the loss.

A method is constructed as `cls(config)` and is a part of the run (train.callback): `prepare` may change the model
before it trains (its forward pass must stay the same function of the same parameters, under the same names),
and `around` is a context for forward and backward of each micro-batch. A run may use several savers that act
on different things; two that act on the same are refused.

What a method acts on is a word that it both provides and conflicts with: `activation_memory` or `loss_memory`. One
that works on sharded parameters has no conflict with `fsdp`, one that works on compiled layers none with `compile`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from modicum.core.registry import Method
from modicum.train.callback import Callback

BASELINE = "none"
SEVERAL = True


class MemorySaver(Method, Callback):
    """Base class: fill `around`, or `prepare`.

    exact: gradients are those of the plain step, up
    to the order of floating-point sums; otherwise conformance allows `gradient_error`, the largest relative
    error of the whole gradient (2-norm).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"activation_memory"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"activation_memory", "fsdp", "compile"})
    gradient_error: ClassVar[float] = 1e-5

    def __init__(self, config: Any):
        self.config = config
