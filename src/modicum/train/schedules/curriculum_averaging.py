"""curriculum-averaging: documents from the worst to the best, little decay, and the mean of the last checkpoints.

Data sorted by quality puts the best where a decaying rate has nearly vanished, and wastes it. So the rate falls only
to `floor` of its peak, and what decay is for (taking the noise out of the last steps) is done by a weighted
average of the last checkpoints. This is the schedule; it brings `order/quality-ascending` and `averaging/lawa` along.

    x  = (done - (1 - decay) total) / (decay total),  clipped to [0, 1]
    lr = floor + (1 - floor) (1 - sqrt(x))

Luo et al. 2025, arXiv:2511.18903, sections 3 and 4: `floor=1` is averaging alone, the default both together. Departs
from the paper: the order is ascending within each domain and the mixture holds between them; over which part of the run
the averaged checkpoints lie and the decay's shape are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from modicum.train.schedules import Schedule, check_warmup, warmed

BRINGS = ("order/quality-ascending", "averaging/lawa:weights=ema")
CLAIM = {
    "figure": "1.64% better average score than shuffled data with a decayed rate",
    "where": "abstract",
    "scale": "1.5B parameters, 30B tokens",
}
SWEEP = {"floor": (0.33, 1)}


@dataclass(frozen=True, kw_only=True)
class Config:
    warmup: float = 0.02  # share of the total below 1, tokens from 1 on
    decay: float = 0.2  # share of the total over which the rate falls
    floor: float = 1 / 3  # of the peak rate, reached at the end; 1: no decay

    def __post_init__(self) -> None:
        check_warmup(self.warmup, self.floor)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1]")


class CurriculumAveraging(Schedule):
    config: Config

    def scale(self, done: float, total: float) -> dict[str, float]:
        c = self.config
        length = c.decay * total
        progress = min(max((done - (total - length)) / length, 0.0), 1.0) if length > 0 else 0.0
        return {"lr": warmed(done, total, c.warmup) * (c.floor + (1 - c.floor) * (1 - math.sqrt(progress)))}
