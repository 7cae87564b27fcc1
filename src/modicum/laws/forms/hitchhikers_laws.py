"""hitchhikers-laws: fit the checkpoints of a few runs, early ones dropped; borrow exponents from another family.

    L = E + A / N^alpha + B / D^beta,      D the tokens that this checkpoint has seen

A procedure over `chinchilla`'s curve: (1) rows are all checkpoints after the first `cut` tokens of each run (10
billion in the authors' code) and the first `cut_share` of it, not final losses only; (2) the measure is the mean
absolute relative error over the last 30% of the largest run's curve (`backtest(heldout="curve")`), beside the spread of
equal runs (`seed_floor`); (3) a new family needs one run: `transfer` takes alpha and A from a stored fit of another
family (`modicum predict --save`) and fits E, B and beta alone; both must count parameters alike.

Choshen et al. 2024, arXiv:2410.11840 (ICML 2025), and IBM/ColPret for settings. Departs: the estimate is this
package's, with checkpoints of one run as dependent observations, thinned, and the priors of `chinchilla` below
`plain_from` runs (the authors use least squares on the raw loss); where the learning rate decays, unfinished
checkpoints lie higher, so the first half of each run is dropped (`cut_share` is then 0.5) and the excess is estimated
in proportion to `decay_left`, the share of the decay still to come.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import CorruptError, UserError
from modicum.laws.estimate import Prior, Problem
from modicum.laws.fit import Fit
from modicum.laws.forms import Table
from modicum.laws.forms.chinchilla import Chinchilla
from modicum.laws.forms.chinchilla import Config as PlainConfig
from modicum.laws.plan import RunSpec
from modicum.laws.table import Runs, as_table, to_columns

CLAIM = {
    "figure": "checkpoints predict better than final losses; about 4% is the floor that seeds set",
    "where": "abstract, section 5",
    "scale": "485 models, more than 1,000 laws",
}
SWEEP = ("cut=1e10", "cut_share=0.5")  # by tokens as the authors, and half of each run
TIGHT = 0.05  # log standard deviation of what is taken from another family


@dataclass(frozen=True, kw_only=True)
class Config(PlainConfig):
    delta: float = 0.05  # residuals count by their squares up to 5%, as the authors' do at any size
    plain_from: int = 7  # runs from which on they speak for themselves, and the priors of chinchilla are nearly flat
    cut: float = 1e10  # tokens at the beginning of each run that are left out
    cut_share: float | None = None  # share of each run, likewise; None: 0.5 where the rate decays, else 0
    upto: float = 1.0  # use rows up to this share of each run
    transfer: str = ""  # a fit of another family (JSON): its alpha and A are taken over

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cut < 0 or not 0 < self.upto <= 1 or not 0 <= (self.cut_share or 0) < self.upto:
            raise ValueError("cut must not be negative, and cut_share lie below upto, both shares from 0 to 1")


TOY = Config(draws=300, cut=0)


class HitchhikersLaws(Chinchilla):
    config: Config
    checkpoints = True

    def used(self, table: Table) -> np.ndarray:
        """Which rows (N) the procedure keeps."""
        end_R = np.zeros(int(table["run"].max()) + 1)
        np.maximum.at(end_R, table["run"], table["tokens"])
        progress_N = table["tokens"] / end_R[table["run"]]
        c = self.config
        decays = bool((table["decay_left"] > 0).any())
        cut_share = (0.5 if decays else 0.0) if c.cut_share is None else c.cut_share
        used_N: np.ndarray = (table["tokens"] > c.cut) & (progress_N > cut_share) & (progress_N <= c.upto + 1e-9)
        return used_N

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        given = to_columns(runs)
        table = as_table(given, self.columns)
        used_N = self.used(table)
        if used_N.sum() < 2:
            raise UserError(
                f"the cut leaves {int(used_N.sum())} rows of {len(used_N)}: runs end at "
                f"{table['tokens'].max():.3g} tokens, cut={self.config.cut:.3g}; set cut= to their warm-up"
            )
        kept = {name: [v for v, use in zip(column, used_N, strict=True) if use] for name, column in given.items()}
        return super().fit(kept, seed)

    def _problem(self, x: Table) -> Problem:
        problem = super()._problem(x)
        p = problem.prior
        if problem.n_runs >= self.config.plain_from and not self.config.transfer:
            problem.prior = Prior(
                p.mean_F, np.concatenate([[3.0, 3.0, 3.0, 1.0, 1.0], p.sd_F[5:]]).clip(p.sd_F), p.upper_F
            )
        elif self.config.transfer:
            other = read_fit(self.config.transfer)
            alpha = other.parameters["alpha"]
            mean_F, sd_F = p.mean_F.copy(), p.sd_F.copy()
            mean_F[1] = np.log(other.parameters["A"]) - alpha * np.log(self._size_unit)
            mean_F[3] = np.log(alpha)
            sd_F[[1, 3]] = TIGHT
            problem.prior = Prior(mean_F, sd_F, p.upper_F)
        return problem

    def reference_of(self, table: Table) -> dict[str, float]:
        reference = super().reference_of(table)
        self._size_unit = reference[self.size]
        return reference

    def runs(self, flops: float) -> list[RunSpec]:
        """Five sizes, each half the next, at 20 tokens per parameter and a constant rate: every checkpoint counts."""
        largest = np.sqrt(flops / (6 * 20 * sum(4.0**-i for i in range(5))))
        return [
            RunSpec(
                parameters=float(largest / 2**i),
                tokens=float(20 * largest / 2**i),
                schedule="constant",
                checkpoints=50,
                why="sizes near the target's predict it best; checkpoints of a constant rate count like runs",
            )
            for i in range(5)
        ]


def read_fit(path: str | Path) -> Fit:
    """A fit stored by `modicum predict --save`. Raises UserError where there is none, or none with alpha and A."""
    try:
        fit = Fit.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError:
        raise UserError(
            f"no fit at {path}; store one with: modicum predict RUNS --law chinchilla --save {path}"
        ) from None
    except json.JSONDecodeError as error:
        raise CorruptError(f"{path} is no stored fit: {error}") from None
    if not {"alpha", "A"} <= fit.parameters.keys():
        raise UserError(f"{path} is a fit of {fit.law}, which has no alpha and A to take over; store one of chinchilla")
    return fit


def seed_floor(runs: Runs) -> float:
    """Mean absolute relative deviation of runs of equal size and tokens from their mean: no law can do better.

    Raises UserError where no two runs are alike.
    """
    table = as_table(runs, ("parameters", "tokens"))
    groups: dict[Any, list[float]] = {}
    for n, d, loss in zip(table["parameters"], table["tokens"], table["loss"], strict=True):
        groups.setdefault((n, d), []).append(loss)
    spread = [
        abs(v / np.mean(g) - 1) * np.sqrt(len(g) / (len(g) - 1)) for g in groups.values() if len(g) > 1 for v in g
    ]
    if not spread:
        raise UserError("no two rows have the same parameters and tokens; train one setting with several seeds")
    return float(np.mean(spread))
