"""infinite-lr: warm up, cool down to a constant rate without a horizon, anneal only before a model is released.

A cosine reaches its floor when its data ends, and training on more data must warm up again, which makes the
model forget. Here the rate settles at a constant level from which training may go on with any new data; a short
exponential anneal branches off whenever a model is wanted. With N_w, N_c, N_d, N_e the ends of warm-up,
cool-down, constant phase and run, and rates as shares of the peak:

    n < N_w          lr = n / N_w
    N_w .. N_c       lr = constant + (1 - constant) / 2 * (1 + cos(pi (n - N_w) / (N_c - N_w)))
    N_c .. N_d       lr = constant
    N_d .. N_e       lr = constant * (floor / constant) ^ ((n - N_d) / (N_e - N_d))

A run that others will go on from is made with `anneal=0` and ends in its constant phase (warmup and cooldown in
tokens then make it independent of any horizon). What goes on from its weights is made with `resumed=true` and
begins in the constant phase; `anneal` says how it ends.

Singh et al. 2025, arXiv:2503.02844, equation 1. Departs from the paper: phases are shares of the run (or tokens)
instead of steps, and their default lengths and level are this file's, since the paper sets them per experiment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from modicum.train.schedules import Schedule, check_warmup

CLAIM = {
    "figure": "lower loss over old and new data than a cosine repeated for each",
    "where": "sections 4 and 5",
    "scale": "MAE on images; language models on three data sets in turn",
}
SWEEP = {"constant": (0.5,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    warmup: float = 0.01  # share of the total below 1, tokens from 1 on
    cooldown: float = 0.25  # length of the cool-down, likewise
    constant: float = 0.5  # rate of the constant phase, of the peak
    anneal: float = 0.15  # length of the anneal at the end, likewise; 0: end in the constant phase
    floor: float = 0.01  # rate at the end of the anneal, of the peak
    resumed: bool = False  # go on from a model that is in its constant phase: no warm-up, no cool-down

    def __post_init__(self) -> None:
        check_warmup(self.warmup)
        for name in ("cooldown", "anneal"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a fraction of the total below 1, or a number of tokens"
                )
        if not 0 < self.floor <= self.constant <= 1:
            raise ValueError(
                f"floor={self.floor} and constant={self.constant} are shares of the peak rate with "
                "0 < floor <= constant <= 1"
            )
        fractions = [x for x in (self.warmup, self.cooldown, self.anneal) if x < 1]
        if not self.resumed and sum(fractions) > 1:
            raise ValueError(f"warmup, cooldown and anneal are {sum(fractions):g} of the run together; at most 1")


class InfiniteLR(Schedule):
    config: Config
    FIRST: ClassVar = {"anneal": 0.0}
    LATER: ClassVar = {"resumed": True}

    def scale(self, done: float, total: float) -> dict[str, float]:
        c = self.config
        warmup, cooldown, anneal = (x * total if x < 1 else x for x in (c.warmup, c.cooldown, c.anneal))
        if not c.resumed and done < warmup:
            return {"lr": done / warmup}
        since = done - (total - anneal)
        if since > 0 and anneal > 0:  # first of all where a run is too short for its phases: it must end annealed
            return {"lr": c.constant * (c.floor / c.constant) ** min(since / anneal, 1.0)}
        if not c.resumed and done < warmup + cooldown:
            fall = (1 + math.cos(math.pi * (done - warmup) / cooldown)) / 2
            return {"lr": c.constant + (1 - c.constant) * fall}
        return {"lr": c.constant}
