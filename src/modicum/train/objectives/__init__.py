"""port objective: what is learnt from a batch.

A method is constructed as `cls(config)`. `loss(model, batch, step)` gives a *sum* over predictions and
their count, never a mean: the loop divides the sum over all micro-batches and processes by the count over
all of them, so the gradient does not depend on how a batch was cut. Randomness, if any, must come from
`step` (its seed, index and micro-batch), so that a resumed run repeats it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from modicum.core.registry import Method
from modicum.train.callback import Callback

BASELINE = "next-token"


@dataclass(frozen=True)
class Step:
    """Where a run is: `index` counts steps from 0, `done` and `total` tokens, `micro` the micro-batch."""

    index: int = 0
    done: int = 0
    total: int = 1
    seed: int = 0
    rank: int = 0
    micro: int = 0


@dataclass(frozen=True)
class Loss:
    """total: scalar float32 with a graph, nats; count: scalar, predictions summed; metrics: scalar sums."""

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Method, Callback):
    """Base class: fill `loss`."""

    conflicts: ClassVar[frozenset[str]] = frozenset()
    random: ClassVar[bool] = False  # whether the loss draws random numbers

    def __init__(self, config: Any):
        self.config = config

    def reserved(self) -> int:
        """Ids at the vocabulary's end that it uses as marks and no text may use."""
        return 0

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        """Sum and count over the batch (or micro-batch). Call the model only through its own methods."""
