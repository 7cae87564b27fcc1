"""constant: linear warm-up, then the peak rate to the end.

The baseline that needs no horizon: a run of any length is the beginning of a longer one.

    lr = min(1, done / warmup)
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.train.schedules import Schedule, check_warmup, warmed


@dataclass(frozen=True, kw_only=True)
class Config:
    warmup: float = 0.02  # share of the total below 1, tokens from 1 on

    def __post_init__(self) -> None:
        check_warmup(self.warmup)


class Constant(Schedule):
    config: Config

    def scale(self, done: float, total: float) -> dict[str, float]:
        return {"lr": warmed(done, total, self.config.warmup)}
