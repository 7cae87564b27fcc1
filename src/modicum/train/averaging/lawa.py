"""lawa: a mean of the weights at the last few points of the run.

The weights are taken at `checkpoints` points spread evenly over the run's last `window`, the last of them at its end.
Their mean has less noise than any of them, which is what a decaying rate is for, and no step before the window enters.

    steps   round((1 - window k / checkpoints) total),   k = checkpoints - 1 ... 0
    average_1 = theta_1;   average_k = average_{k-1} + c_k (theta_k - average_{k-1})
    c_k = 1 / k (mean: all alike),  2 / (k + 1) (linear: weight k),  alpha (ema)

Kaddour 2022, arXiv:2209.14981, section 2: the plain mean of the latest checkpoints; Luo et al. 2025, arXiv:2511.18903,
section 3, weigh later ones more. Departs from the first, which averages at every moment the k epochs before it:
here only the mean that the run ends with is kept, in one copy whatever `checkpoints` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modicum.train.averaging import Averaging

CLAIM = {
    "figure": "the loss of a run 1.5 to 2 times as long, in the middle of training",
    "where": "section 3",
    "scale": "RoBERTa-base, WikiText-103",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoints: int = 6  # how many are averaged
    window: float = 0.05  # share of the run over which they are spread
    weights: Literal["mean", "linear", "ema"] = "mean"
    alpha: float = 0.2  # weight of each new checkpoint in the ema

    def __post_init__(self) -> None:
        if self.checkpoints < 1:
            raise ValueError(f"checkpoints={self.checkpoints} must be at least 1 (1 averages nothing)")
        if not 0 < self.window <= 1:
            raise ValueError(f"window={self.window} must be a fraction of the run, above 0 and at most 1")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in (0, 1]")


TOY = Config(checkpoints=3, window=0.5)


class LAWA(Averaging):
    config: Config

    def points(self, total: int) -> list[int]:
        """Steps, of a run of `total`, after which the weights enter the average; the last one is the last."""
        c = self.config
        fractions = [1 - c.window * k / c.checkpoints for k in range(c.checkpoints)]
        return sorted({max(1, round(fraction * total)) for fraction in fractions})

    def coefficient(self, step: int, total: int, count: int) -> float | None:
        points = self.points(total)
        if step not in points:
            return None
        if step == points[0]:  # also where a finished run is made longer: what it averaged is of the past
            return 1.0
        k = count + 1
        return {"mean": 1 / k, "linear": 2 / (k + 1), "ema": self.config.alpha}[self.config.weights]
