"""ema: an exponential moving average of the weights over all steps.

Each step moves the average a little towards the weights, so that it lags behind them and loses the noise of the last
steps, as a decayed learning rate does. Early in a run, where the weights still move far, it forgets faster: with
`decay` alone an average over some 1 / (1 - decay) steps would still hold a short run's first weights.

    average_1 = theta_1;   average_t = average_{t-1} + c_t (theta_t - average_{t-1})
    c_t = max(1 - decay, (1 + gamma) / (t + gamma))

With gamma = 0 it begins as the plain mean, with larger gamma the past's weight falls as the power gamma + 1 of t, until
1 - decay is reached. The initial weights theta_0 never enter, so there is no bias to correct.

Polyak and Juditsky 1992; Morales-Brotons et al. 2024, arXiv:2411.18704, section 2 (decay 0.999 and the like); the
polynomial beginning: Shamir and Zhang 2013, arXiv:1212.1824, section 4. Departs from them in joining the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.train.averaging import Averaging

CLAIM = {
    "figure": "better test accuracy than the last weights at a constant rate, as with a decayed one",
    "where": "section 4",
    "scale": "ResNet-18, CIFAR-100",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    decay: float = 0.999  # of the average in each step, late in the run
    gamma: float = 8.0  # how fast the first steps are forgotten; 0: plain mean at first
    every: int = 1  # steps between two updates

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1)")
        if self.gamma < 0:
            raise ValueError(f"gamma={self.gamma} must be at least 0")
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1")


class EMA(Averaging):
    config: Config

    def coefficient(self, step: int, total: int, count: int) -> float | None:
        c = self.config
        if step % c.every:
            return None
        return max(1 - c.decay, (1 + c.gamma) / (count + 1 + c.gamma))
