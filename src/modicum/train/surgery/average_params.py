"""average-params: prunes by magnitude from a quarter to three quarters of the training compute.

The model trains dense, loses the smallest of all its layers' weights in many small rounds of equal ratio, and
recovers at the final sparsity. What predicts its loss is the average of its parameter count over training,
which the result of a run reports (`average_parameters`) and which FLOPs are counted by.

    keep(round r of n) = (1 - sparsity)^(r / n)          the largest magnitudes of all layers together
    rounds from `start` to `end`, shares of the run's total FLOPs
    N_avg = mean over tokens of N(t)                     FLOPs = dense - 6 T (N - N(t))

Jin et al. 2025, arXiv:2501.12486, abstract; rounds of equal ratio and one threshold over all layers as in the
authors' program (tjingrant/sparse-llm-code), which prunes every 100 steps. Departs from the paper: the time
between rounds defaults to a share of the run, so that short runs have as many; output head and embeddings
are not pruned; equal magnitudes are pruned together; the matrix products are executed dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from modicum.core.errors import UserError
from modicum.train.engine import TrainEngine
from modicum.train.surgery._masks import Masking, check_sparsity, smallest

CLAIM = {
    "figure": "loss of a dense model at equal compute, with fewer parameters at the end",
    "where": "abstract",
    "scale": "58M to 468M parameters",
}
SWEEP = {"sparsity": (0.5,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    sparsity: float = 0.5  # at the end, over the weights of all layers
    start: float = 0.25  # of the total FLOPs: the first round
    end: float = 0.75  # of the total FLOPs: the last round
    every: float = 0.01  # between rounds: share of the run's steps below 1, steps from 1 on

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start={self.start} and end={self.end} must be shares of the compute, start below end")
        if self.every <= 0:
            raise ValueError(f"every={self.every} must be positive: a share of the steps below 1, or steps")


class GradualPruning(Masking):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.density = 1.0  # as pruned so far
        self.first, self.every, self.rounds = 0, 1, 1  # in steps; set at the start

    def start(self, trainer: TrainEngine) -> None:
        super().start(trainer)
        steps = trainer.config.total_steps
        fraction = 6.0 * trainer.config.sequence_length * sum(self.sizes.values()) / trainer.row_flops
        first, last = window(self.config, steps, fraction)
        self.first = max(first, 1)
        every = self.config.every
        self.every = max(round(every * steps if every < 1 else every), 1)
        self.rounds = max(last - self.first, 0) // self.every + 1
        if self.first >= steps:
            raise UserError(
                f"average-params would begin to prune after step {self.first}, and the run ends after {steps}; "
                "give a smaller start, or a longer run"
            )

    def planned(self, step: int) -> float:
        """Share of the weights kept in step `step`."""
        if step < self.first:
            return 1.0
        done = min((step - self.first) // self.every + 1, self.rounds)
        return (1 - self.config.sparsity) ** (done / self.rounds)

    def marks(self, trainer: TrainEngine) -> list[int]:
        return [self.first]

    def removed(self, step: int) -> int:
        weights = sum(self.sizes.values())
        return weights - round(weights * min(self.density, self.planned(step)))

    def after_step(self, trainer: TrainEngine) -> None:
        planned = self.planned(trainer.steps_done)
        if planned < self.density:
            self.cut = {}  # not both masks at once
            self.density = planned
            weights = {name: trainer.named[name] for name in self.sizes}
            self.cut = smallest(weights, self.removed(trainer.steps_done), trainer.ranks)
        self.apply(trainer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"density": self.density}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.density = state["density"]


def window(config: Config, steps: int, fraction: float) -> tuple[int, int]:
    """(first, last) step after which weights are pruned, so that the run's FLOPs stand at `start` and `end`.

    share: of a dense step's FLOPs that is spent on prunable weights. A step at density d costs
    1 - share (1 - d) of a dense one, and during the rounds (1 - d) / log(1 / d) of the weights are left on average.
    """
    kept = 1 - config.sparsity
    costs = [1 - fraction * (1 - d) for d in (1.0, (1 - kept) / math.log(1 / kept), kept)]
    parts = [
        part / cost for part, cost in zip((config.start, config.end - config.start, 1 - config.end), costs, strict=True)
    ]
    scale = steps / sum(parts)
    return round(parts[0] * scale), round((parts[0] + parts[1]) * scale)
