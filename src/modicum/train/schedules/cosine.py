"""cosine: linear warm-up, then half a cosine down to a floor.

The rate rises linearly over the warm-up and follows half a period of a cosine from its peak to
`floor` times its peak at the last token.

    x  = (done - warmup) / (total - warmup)
    lr = floor + (1 - floor) * (1 + cos(pi x)) / 2

Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, without restarts. Departs from the paper: it
adds the warm-up and the floor of a tenth that language-model pretraining uses (Touvron et al. 2023,
arXiv:2302.13971, section 2.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from modicum.train.schedules import Schedule, check_warmup, warmed


@dataclass(frozen=True, kw_only=True)
class Config:
    warmup: float = 0.02  # share of the total below 1, tokens from 1 on
    floor: float = 0.1  # of the peak rate, reached at the end

    def __post_init__(self) -> None:
        check_warmup(self.warmup, self.floor)


class Cosine(Schedule):
    config: Config

    def scale(self, done: float, total: float) -> dict[str, float]:
        config = self.config
        rise = warmed(done, total, config.warmup)
        if rise < 1:
            return {"lr": rise}
        start = config.warmup * total if config.warmup < 1 else config.warmup
        progress = min(max((done - start) / (total - start), 0.0), 1.0) if total > start else 1.0
        return {"lr": config.floor + (1 - config.floor) * (1 + math.cos(math.pi * progress)) / 2}
