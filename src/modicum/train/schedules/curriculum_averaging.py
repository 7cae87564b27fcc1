"""curriculum-averaging: documents from the worst to the best, little decay, and the mean of the last checkpoints.

Data sorted by quality puts the best where a decaying rate has nearly vanished, and wastes it. So the rate falls only
to `floor` of its peak, and what decay is for (taking the noise out of the last steps) is done by a
weighted average of the weights at the last `checkpoints` points, spread evenly over the run's last `window`:

    average_1 = theta_1;   average_k = average_{k-1} + c_k (theta_k - average_{k-1})
    c_k = alpha (ema),  1 / k (sma: all alike),  2 / (k + 1) (wma: weight k)
    x  = (done - (1 - decay) total) / (decay total),  clipped to [0, 1]
    lr = floor + (1 - floor) (1 - sqrt(x))

The stream gives each domain's documents in ascending order of their scores (`data.stream`, order="quality"). The
average replaces the weights when the run finishes; until then it is a part of every checkpoint. It takes 4 bytes
per trained weight, from the start to the end, whatever `checkpoints` is.

Luo et al. 2025, arXiv:2511.18903, sections 3 and 4: `floor=1` is averaging alone, the default both together. Departs
from the paper: the order is ascending within each domain and the mixture holds between them; where the checkpoints lie
(`window`) and the decay's shape are this file's. Saved averages are of the float32 masters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modicum.train.schedules import Schedule, check_warmup, warmed

CLAIM = {
    "figure": "1.64% better average score than shuffled data with a decayed rate",
    "where": "abstract",
    "scale": "1.5B parameters, 30B tokens",
}
SWEEP = ("floor=0.33", "floor=1")


@dataclass(frozen=True, kw_only=True)
class Config:
    warmup: float = 0.02  # share of the total below 1, tokens from 1 on
    decay: float = 0.2  # share of the total over which the rate falls
    floor: float = 1 / 3  # of the peak rate, reached at the end; 1: no decay
    checkpoints: int = 6  # how many are averaged
    window: float = 0.2  # share of the total over which they are spread
    average: Literal["ema", "sma", "wma"] = "ema"
    alpha: float = 0.2  # weight of each new checkpoint in the ema

    def __post_init__(self) -> None:
        check_warmup(self.warmup, self.floor)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1]")
        if self.checkpoints < 1:
            raise ValueError(f"checkpoints={self.checkpoints} must be at least 1 (1 averages nothing)")
        if not 0 < self.window <= 1:
            raise ValueError(f"window={self.window} must be a share of the run, above 0 and at most 1")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in (0, 1]")


class CurriculumAveraging(Schedule):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.count = 0  # checkpoints in the average
        self.average: dict[str, Tensor] = {}

    def scale(self, done: float, total: float) -> dict[str, float]:
        c = self.config
        length = c.decay * total
        share = min(max((done - (total - length)) / length, 0.0), 1.0) if length > 0 else 0.0
        return {"lr": warmed(done, total, c.warmup) * (c.floor + (1 - c.floor) * (1 - math.sqrt(share)))}

    def stream_knobs(self) -> dict[str, Any]:
        return {"order": "quality"}

    def points(self, steps: int) -> list[int]:
        """Steps, of a run of `steps`, after which the weights enter the average; the last one is the last."""
        c = self.config
        shares = [1 - c.window * k / c.checkpoints for k in range(c.checkpoints)]
        return sorted({max(1, round(share * steps)) for share in shares})

    def start(self, trainer: Any) -> None:
        from modicum.train.parallel import shard_like

        held, self.average = self.average, {}
        for name, p in trainer.named.items():
            self.average[name] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            if name in held:
                self.average[name].copy_(shard_like(held[name].to(p.device), p))

    @torch.no_grad()
    def after_step(self, trainer: Any) -> None:
        points = self.points(trainer.config.total_steps)
        if trainer.steps_done not in points:
            return
        if not self.fits(trainer):  # another model has taken the place of the one averaged
            self.average, self.count = {}, 0
            self.start(trainer)
        self.count = 1 if trainer.steps_done == points[0] else self.count + 1
        k, kind = self.count, self.config.average
        share = 1.0 if k == 1 else {"ema": self.config.alpha, "sma": 1 / k, "wma": 2 / (k + 1)}[kind]
        for name, p in trainer.named.items():
            self.average[name].lerp_(p.detach().float(), share)

    def fits(self, trainer: Any) -> bool:
        return {n: p.shape for n, p in trainer.named.items()} == {n: a.shape for n, a in self.average.items()}

    @torch.no_grad()
    def finish(self, trainer: Any) -> None:
        if self.fits(trainer):
            for name, p in trainer.named.items():
                p.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count} | {f"average.{name}": value for name, value in self.average.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.average = {n.removeprefix("average."): v for n, v in state.items() if n.startswith("average.")}
