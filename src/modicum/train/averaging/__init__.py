"""port averaging: which mean of the weights along a run is what it ends with.

A method is constructed as `cls(config)` and is a callback of the run. It keeps one float32 copy of the trained weights,
counted by the plan and kept in every checkpoint; when the run finishes, the copy takes the weights' place. Until then
training does not see it. Under bf16 it averages the float32 masters, under FSDP2 each process its shards.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from modicum.core.registry import Method
from modicum.train.callback import Callback
from modicum.train.parallel import shard_like

if TYPE_CHECKING:
    from modicum.train.engine import TrainEngine

BASELINE = "none"


class Averaging(Method, Callback):
    """Base class: fill `coefficient`."""

    conflicts: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any):
        self.config = config
        self.count = 0  # snapshots in the average
        self.average: dict[str, Tensor] = {}

    @abstractmethod
    def coefficient(self, step: int, total: int, count: int) -> float | None:
        """c in `average += c (weights - average)` after step `step` (from 1) of `total`; None leaves this step out.

        count: snapshots in the average so far. The first always enters with c = 1, and c = 1 begins a new average.
        """

    def start(self, trainer: TrainEngine) -> None:
        saved, self.average = self.average, {}
        for name, p in trainer.named.items():
            self.average[name] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            if name in saved and saved[name].shape == p.shape:
                self.average[name].copy_(shard_like(saved[name].to(p.device), p))

    @torch.no_grad()
    def after_step(self, trainer: TrainEngine) -> None:
        if not self.fits(trainer):  # another model has taken the place of the one averaged
            self.count, self.average = 0, {}
            self.start(trainer)
        c = self.coefficient(trainer.steps_done, trainer.config.total_steps, self.count)
        if c is None:
            return
        c = c if self.count else 1.0
        self.count = 1 if c == 1.0 else self.count + 1
        for name, p in trainer.named.items():
            self.average[name].lerp_(p.detach().float(), c)

    @torch.no_grad()
    def finish(self, trainer: TrainEngine) -> None:
        if self.count and self.fits(trainer):
            for name, p in trainer.named.items():
                p.copy_(self.average[name])

    def fits(self, trainer: TrainEngine) -> bool:
        """Whether the average is of the weights that the run has now."""
        named, average = trainer.named, self.average
        return named.keys() == average.keys() and all(p.shape == average[name].shape for name, p in named.items())

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count} | {f"average.{name}": value for name, value in self.average.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.average = {n.removeprefix("average."): v for n, v in state.items() if n.startswith("average.")}
