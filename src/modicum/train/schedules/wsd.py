"""wsd: warm-up, a long stable phase at the peak rate, a short decay at the end.

The rate stays at its peak until the last `decay` share of the tokens and then falls to `floor`. Runs
of several lengths can share the stable phase and differ in their decays.

    x  = (done - (1 - decay) total) / (decay total)        clipped to [0, 1]
    lr = floor + (1 - floor) * (1 - sqrt(x))               shape sqrt; linear: 1 - x

Hu et al. 2024, arXiv:2404.06395, section 4.2, with the decay's 1 - sqrt shape of Hägele et al. 2024,
arXiv:2405.18392, section 3, which is better than a line there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modicum.train.schedules import Schedule, check_warmup, warmed


@dataclass(frozen=True, kw_only=True)
class Config:
    warmup: float = 0.02  # share of the total below 1, tokens from 1 on
    decay: float = 0.2  # share of the total
    floor: float = 0.0  # of the peak rate, reached at the end
    shape: Literal["sqrt", "linear"] = "sqrt"

    def __post_init__(self) -> None:
        check_warmup(self.warmup, self.floor)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1]")


class WSD(Schedule):
    config: Config

    def scale(self, done: float, total: float) -> dict[str, float]:
        config = self.config
        length = config.decay * total
        progress = min(max((done - (total - length)) / length, 0.0), 1.0) if length > 0 else 0.0
        fall = 1 - (math.sqrt(progress) if config.shape == "sqrt" else progress)
        return {"lr": warmed(done, total, config.warmup) * (config.floor + (1 - config.floor) * fall)}
