"""data-ablation-merging: judge a union of domains by the mean of models that were each trained on one of them.

    theta_i = theta_0 trained on domain i, the same tokens and schedule for each
    loss of the union C  ~  loss of  mean over i in C of theta_i          ranks only, not values

One run for each domain then scores any number of unions at the price of an evaluation. All models go on from one, so
that their mean lies between them rather than on a ridge; means of models from different starts are noise. `check`
unions are also trained on in truth, for the rank correlation with the merged scores, beside that of the plain mean of
the single models' losses, which merging must beat. The chosen union's weights are equal.

Na et al. 2024, arXiv:2410.15661 (EMNLP 2024). Departs: the seed model is one of the study's size trained on everything
for `warm` times a run, not a long pretraining; weights are equal, and unions of unequal parts are not tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.experiments import Conclusion, Experiment, Run, Trial, by_name, left

SWEEP = ("sizes=[2]",)  # pairs of domains: all unions of 13 domains cost more in evaluations than in training
CLAIM = {"figure": "perplexity of merged and of trained models correlate", "where": "abstract", "scale": "1.1B"}


@dataclass(frozen=True, kw_only=True)
class Config:
    sizes: tuple[int, ...] = (2, 3)  # domains in a union
    unions: int = 200  # that are scored by merging, at random if there are more
    check: int = 4  # that are trained on in truth as well; the best one is always among them
    warm: float = 2.0  # length of the common start's run; 0 with a given model

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or self.unions < 1 or self.check < 0 or self.warm < 0:
            raise ValueError("sizes and unions are at least 1, check and warm not below 0")


TOY = Config(sizes=(2,), unions=3, check=1, warm=1.0)


class DataAblationMerging(Experiment):
    config: Config

    @property
    def _start(self) -> str:
        return "" if self.setting.given else "start"

    def unions(self) -> list[tuple[str, ...]]:
        """Those that are scored, in a random order."""
        every = [c for n in self.config.sizes for c in itertools.combinations(self.setting.domains, n)]
        if not every:
            raise UserError(f"{len(self.setting.domains)} domains have no union of {self.config.sizes}; give more")
        order = np.random.default_rng([self.setting.seed, 53]).permutation(len(every))
        return [every[int(i)] for i in order[: self.config.unions]]

    def propose(self, runs: Sequence[Run]) -> list[Trial]:
        starts = [Trial(name="start", length=self.config.warm)] if self._start else []
        units = [Trial(name=f"on {d}", weights={d: 1.0}, start=self._start) for d in self.setting.domains]
        merges = [Trial(name=f"merge {'+'.join(u)}", merge=tuple(f"on {d}" for d in u)) for u in self.unions()]
        for stage in (starts, units, merges):
            if todo := left(stage, runs):
                return todo
        if not self.config.check:
            return []
        scored = by_name(runs)
        best = min(self.unions(), key=lambda u: self.setting.score(scored[f"merge {'+'.join(u)}"]))
        chosen = dict.fromkeys([best, *self.unions()])
        return left([self._real(u) for u in list(chosen)[: self.config.check]], runs)

    def _real(self, union: tuple[str, ...]) -> Trial:
        """The run that the merge stands for: as many tokens of each domain as its single run had."""
        return Trial(
            name=f"real {'+'.join(union)}", weights=dict.fromkeys(union, 1.0), start=self._start, length=len(union)
        )

    def conclude(self, runs: Sequence[Run]) -> Conclusion:
        scored = by_name(runs)
        rows: list[dict[str, Any]] = []
        for union in self.unions():
            name = "+".join(union)
            rows.append(
                {
                    "union": name,
                    "merged": self.setting.score(scored[f"merge {name}"]),
                    "mean_of_singles": float(np.mean([self.setting.score(scored[f"on {d}"]) for d in union])),
                    "trained": self.setting.score(scored[f"real {name}"]) if f"real {name}" in scored else None,
                }
            )
        rows.sort(key=lambda r: r["merged"])
        best = rows[0]
        return Conclusion(
            rows=rows,
            weights={d: 1.0 if d in best["union"].split("+") else 0.0 for d in self.setting.domains},
            predicted=best["trained"] if best["trained"] is not None else best["merged"],
            notes=tuple(_correlations(rows)),
        )


def _correlations(rows: Sequence[dict[str, Any]]) -> list[str]:
    from scipy.stats import spearmanr

    real = [r for r in rows if r["trained"] is not None]
    if len(real) < 3:
        return ["merged losses give ranks, not values; fewer than 3 unions were trained on to check them"]
    trained = [r["trained"] for r in real]
    merged, single = (float(spearmanr([r[n] for r in real], trained)[0]) for n in ("merged", "mean_of_singles"))
    return [
        f"rank correlation with {len(real)} trained unions: merged {merged:.2f}, mean of the single runs {single:.2f}"
    ]
