"""projektor: choose a mixture for a larger run from its transport distance to the target and pilots of two sizes.

    pilots     `mixtures` mixtures, each trained on at two sizes; OT(w) = distance of its text to the target's
    law        laws/forms/projektor.py: V(n, w) = sum_i (b2_i w_i^2 + b1_i w_i + b0) OT(w) + sum_i (c1_i w_i + c0) at
               both sizes, straight on in log n beyond
    choice     projected gradient on the simplex at `times` the larger size

Kang et al. 2023, arXiv:2307.02460 (NeurIPS 2023). Departs: distances of embeddings alone, as text has no labels; of LSA
over samples of the domains unless the study has an encoder. The loss is linear in log n over a short range only, so the
law refuses more than 8 times the larger pilot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.laws.experiments import Conclusion, Experiment, Run, Trial, left
from modicum.laws.experiments._mixtures import drawn, fractions_of, measured

CLAIM = {"figure": "better selection than scaling-law baselines", "where": "abstract", "scale": "CIFAR-10, 3 sources"}


@dataclass(frozen=True, kw_only=True)
class Config:
    mixtures: int = 8  # trained on at each size
    sizes: tuple[float, float] = (0.5, 1.0)  # in units of the study's tokens
    times: float = 4.0  # the larger size, for which the mixture is chosen
    concentration: float = 1.5

    def __post_init__(self) -> None:
        if self.mixtures < 4 or not 0 < self.sizes[0] < self.sizes[1] or not 0 < self.times <= 8:
            raise ValueError("mixtures is at least 4, sizes rise, times is at most 8")


TOY = Config(mixtures=8)


class Projektor(Experiment):
    config: Config
    compares = True

    def propose(self, runs: Sequence[Run]) -> list[Trial]:
        if self.setting.distance is None:
            raise UserError("projektor needs text of the domains and of the target to measure distances")
        terms = 2 + 3 * (len(self.setting.domains) - 1)
        if self.config.mixtures < terms:
            raise UserError(
                f"projektor's law has {terms} terms for {len(self.setting.domains)} domains, more than mixtures="
                f"{self.config.mixtures}; give mixtures={terms}, or a pool of fewer domains"
            )
        rng = np.random.default_rng([self.setting.seed, 59])
        mixtures = drawn(rng, self.setting, self.config.mixtures, self.config.concentration)
        trials = [
            Trial(name=f"mix-{i} at {size:g}", weights=self.setting.weights(w), length=size)
            for size in self.config.sizes
            for i, w in enumerate(mixtures)
        ]
        return left(trials, runs)

    def conclude(self, runs: Sequence[Run]) -> Conclusion:
        distance = self.setting.distance
        assert distance
        records = []
        for run in runs:
            w = fractions_of(run, self.setting)
            ratios = {f"ratio_{d}": float(x) for d, x in zip(self.setting.domains, w, strict=True)}
            size = run.trial.length * self.setting.tokens
            records.append({"tokens": size, "transport": distance(w)[0], "loss": self.setting.score(run)} | ratios)
        law = registry.build("law", "projektor")
        fit = law.fit(records, seed=self.setting.seed)
        order = [fit.extra["sources"].index(f"ratio_{d}") for d in self.setting.domains]  # the law sorts names

        def sorted_distance(w: np.ndarray) -> tuple[float, np.ndarray]:
            cost, slope = distance(w[order])
            back = np.empty_like(slope)
            back[order] = slope
            return cost, back

        tokens = self.config.times * self.config.sizes[1] * self.setting.tokens
        best = law.select(fit, sorted_distance, tokens)[order]
        point = {f"ratio_{d}": [float(x)] for d, x in zip(self.setting.domains, best, strict=True)}
        answer = law.predict(fit, point | {"tokens": [tokens], "transport": [distance(best)[0]]})
        return Conclusion(
            rows=measured(runs, self.setting),
            weights=self.setting.weights(best),
            predicted=float(answer.mean[0]),
            low=float(answer.low[0]),
            high=float(answer.high[0]),
            notes=(f"predicted for {tokens:.3g} tokens, {self.config.times:g} times the larger pilots",),
        )
