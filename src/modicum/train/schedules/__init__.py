"""port schedule: how the learning rate (and other scales) follow the share of training done.

A method is constructed as `cls(config)`. `scale(done, total)` is pure: it depends on the tokens done and
the tokens planned and on nothing else, so a resumed or extended run needs no state. `done` is the middle
of the step being made, so that neither its first nor its last step has rate zero.

A method that needs an order of the data or an average of the weights says so in `BRINGS`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from modicum.core.registry import Method
from modicum.train.callback import Callback

BASELINE = "cosine"


class Schedule(Method, Callback):
    """Base class: fill `scale`.

    FIRST, LATER: knobs for a run that another will go on from on new data, and for that later run. A schedule
    without them begins every run anew.
    """

    FIRST: ClassVar[dict[str, Any]] = {}
    LATER: ClassVar[dict[str, Any]] = {}
    conflicts: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def scale(self, done: float, total: float) -> dict[str, float]:
        """{"lr": factor of the peak rate, ...} with 0 <= done <= total, both in tokens."""


def warmed(done: float, total: float, warmup: float) -> float:
    """Linear warm-up factor in [0, 1]. `warmup` is a share of the total below 1, tokens from 1 on."""
    tokens = warmup * total if warmup < 1 else warmup
    return min(1.0, done / tokens) if tokens > 0 else 1.0


def check_warmup(warmup: float, floor: float = 0.0) -> None:
    if warmup < 0:
        raise ValueError(f"warmup={warmup} is negative; a share of the total below 1, or a number of tokens")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} must lie in [0, 1]")
