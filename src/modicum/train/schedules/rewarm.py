"""rewarm: for training on with new data, warm the rate up again and decay it along a cosine again.

A model whose rate has decayed learns new data slowly at the low rate it ended with. Raising the rate again first
raises the loss on old and new data alike, and in the long run gives the lower loss on the new. The length of
the warm-up matters little (the paper compares 0, 0.5, 1 and 2% of the new tokens); the height of the peak trades
new data against old, which is why it is a knob.

    done < warmup    lr = start + (peak - start) * done / warmup
    after            lr = peak * (floor + (1 - floor) * (1 + cos(pi x)) / 2)      x from 0 to 1 over the rest

Gupta et al. 2023, arXiv:2308.04014, section 3. `start` is 0 there; with `start` at the rate that the earlier run
ended with there is no jump. `peak=0.1,warmup=0` is the paper's baseline of not warming up again. Departs from the
paper: that baseline keeps decaying from the low rate, which the paper keeps constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from modicum.train.schedules import Schedule, check_warmup

CLAIM = {
    "figure": "lower loss on new data than at the low rate; the warm-up's length hardly matters",
    "where": "figures 1 to 4",
    "scale": "Pythia 410M, the Pile then SlimPajama, 300B tokens each",
}
SWEEP = {"warmup": (0.02,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    warmup: float = 0.01  # share of the total below 1, tokens from 1 on; the paper compares 0, 0.005, 0.01, 0.02
    peak: float = 1.0  # rate warmed up to, of the run's lr; the paper compares 0.5, 1 and 2 of the earlier run's
    floor: float = 0.1  # of the peak, reached at the end
    start: float = 0.0  # where the warm-up begins, of the run's lr

    def __post_init__(self) -> None:
        check_warmup(self.warmup, self.floor)
        if not 0 < self.peak < math.inf:
            raise ValueError(f"peak={self.peak} must be a positive factor of the rate, such as 1 or 0.5")
        if not 0 <= self.start <= self.peak:
            raise ValueError(f"start={self.start} must lie between 0 and peak={self.peak}")


class Rewarm(Schedule):
    config: Config
    FIRST: ClassVar = {"warmup": 0.02, "peak": 1.0, "start": 0.0}  # a first run is the usual warm-up and cosine

    def scale(self, done: float, total: float) -> dict[str, float]:
        c = self.config
        warmup = c.warmup * total if c.warmup < 1 else c.warmup
        if done < warmup:
            return {"lr": c.start + (c.peak - c.start) * done / warmup}
        progress = min((done - warmup) / (total - warmup), 1.0) if total > warmup else 1.0
        return {"lr": c.peak * (c.floor + (1 - c.floor) * (1 + math.cos(math.pi * progress)) / 2)}
