"""random: as many mixtures as wanted from a Dirichlet distribution around the domains' sizes; the best measured one.

    w ~ Dirichlet(concentration K n / sum(n)),  the first w = n / sum(n);   w* = argmin over runs of the loss

What every search must beat at an equal number of runs (Bergstra & Bengio 2012, JMLR 13). The winner's measured loss is
optimistic: it was chosen for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.laws.experiments import Conclusion, Experiment, Run, Trial, left
from modicum.laws.experiments._mixtures import best_measured, drawn


@dataclass(frozen=True, kw_only=True)
class Config:
    runs: int = 28  # mixtures that are trained on
    concentration: float = 1.0  # of the Dirichlet distribution

    def __post_init__(self) -> None:
        if self.runs < 1 or self.concentration <= 0:
            raise ValueError("runs is at least 1, concentration above 0")


TOY = Config(runs=3)


class Random(Experiment):
    config: Config

    def propose(self, runs: Sequence[Run]) -> list[Trial]:
        rng = np.random.default_rng([self.setting.seed, 41])
        mixtures = drawn(rng, self.setting, self.config.runs, self.config.concentration)
        mixtures[0] = self.setting.natural()
        trials = [Trial(name=f"mix-{i}", weights=self.setting.weights(w)) for i, w in enumerate(mixtures)]
        return left(trials, runs)

    def conclude(self, runs: Sequence[Run]) -> Conclusion:
        return best_measured(runs, self.setting)
