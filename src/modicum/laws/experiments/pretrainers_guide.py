"""pretrainers-guide: what age, quality, toxicity and domains of pretraining text do, one factor at a time.

    arms       all text; without domain d; the best `quality` fractions and the inverse; the least toxic fractions and
               the inverse; text before each cutoff
    effect     mean over seeds of loss(arm) - loss(all text), paired by seed, in every group of held-out text
    interval   +- t(df) s sqrt(1 / seeds), s pooled over all arms of a group, df = arms (seeds - 1)
    decay      slope of loss(cutoff, year) - mean over cutoffs, against how many years the text is past the cutoff

Every arm trains on the same number of tokens, so a smaller set is repeated more: its epochs stand in the table.
Filters are cuts of a column of numbers by the fraction of tokens that stays: `quality` from the step `score` or
`attribute`, the attribute (toxicity, or any other) from the step `attribute`, the year from the documents' dates.

Longpre et al. 2023, arXiv:2305.13169, sections 4 to 6. Departs: losses of held-out text instead of scores after
finetuning; seeds and intervals, where the paper has one run of each; cuts by fractions of tokens instead of a
classifier's probability. At 20M parameters the paper's own temporal decay is 0.08 and not significant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.experiments import Between, Conclusion, Experiment, Run, Setting, Trial, by_name, left

CLAIM = {"figure": "QA +2.5 points by the mildest quality filter", "where": "figure 5", "scale": "1.5B, 185B tokens"}


@dataclass(frozen=True, kw_only=True)
class Config:
    domains: bool = True  # leave each one out
    quality: str = ""  # column of a score, higher is better; "": no such arms
    quality_keep: tuple[float, ...] = (0.91, 0.73, 0.46)  # fractions of tokens, best first
    quality_inverse: tuple[float, ...] = (0.73,)  # fractions, worst first
    attribute: str = ""  # column of what is to be filtered out, higher is more toxic
    attribute_keep: tuple[float, ...] = (0.95, 0.76, 0.61)
    attribute_inverse: tuple[float, ...] = (0.92,)
    cutoffs: tuple[float, ...] = ()  # years: text before each
    seeds: int = 3

    def __post_init__(self) -> None:
        fractions = (*self.quality_keep, *self.quality_inverse, *self.attribute_keep, *self.attribute_inverse)
        if self.seeds < 2 or not all(0 < f < 1 for f in fractions):
            raise ValueError("seeds is at least 2 (intervals need them), fractions lie between 0 and 1")
        if len(self.cutoffs) == 1:
            raise ValueError("cutoffs are at least two years, to compare them")


TOY = Config(seeds=2)


class PretrainersGuide(Experiment):
    config: Config

    @classmethod
    def reads(cls, config: Config) -> tuple[str, ...]:
        return tuple(c for c in (config.quality, config.attribute, "year" if config.cutoffs else "") if c)

    def arms(self) -> dict[str, Trial]:
        """The grid without seeds, by name; the first is all text."""
        c, s = self.config, self.setting
        arms = [Trial(name="all")]
        if c.domains and len(s.domains) > 1:
            for out in s.domains:
                rest = {d: n for d, n in s.domains.items() if d != out}
                arms.append(Trial(name=f"without {out}", weights=rest))
        for column, keep, inverse, high in (
            (c.quality, c.quality_keep, c.quality_inverse, True),
            (c.attribute, c.attribute_keep, c.attribute_inverse, False),
        ):
            if column:
                arms += [Trial(name=f"{column} {f:.0%}", keep=(cut(s, column, f, high),)) for f in keep]
                arms += [Trial(name=f"{column} inverse {f:.0%}", keep=(cut(s, column, f, not high),)) for f in inverse]
        arms += [Trial(name=f"before {year:g}", keep=(Between(column="year", high=year),)) for year in c.cutoffs]
        if len(arms) < 2:
            raise UserError("the grid has no arm; give domains, quality=COLUMN, attribute=COLUMN or cutoffs=[YEARS]")
        return {a.name: a for a in arms}

    def groups(self) -> dict[str, Between]:
        """Held-out text by the years between the cutoffs, and after the last."""
        years = sorted(self.config.cutoffs)
        if not years:
            return {}
        wide = (years[-1] - years[0]) / (len(years) - 1)
        edges = [years[0] - wide, *years, years[-1] + wide]
        return {f"{a:g} to {b:g}": Between(column="year", low=a, high=b) for a, b in itertools.pairwise(edges)}

    def propose(self, runs: Sequence[Run]) -> list[Trial]:
        seeded = [
            replace(arm, name=f"{arm.name} #{k}", seed=k)
            for k in range(self.config.seeds)
            for arm in self.arms().values()
        ]
        return left(seeded, runs)

    def conclude(self, runs: Sequence[Run]) -> Conclusion:
        done, arms, seeds = by_name(runs), [*self.arms()], self.config.seeds
        groups = [*done["all #0"].losses]
        loss_ASG = np.array([[[done[f"{a} #{k}"].losses[g] for g in groups] for k in range(seeds)] for a in arms])
        score_AS1 = np.array([[[self.setting.score(done[f"{a} #{k}"])] for k in range(seeds)] for a in arms])
        mean_G, half_G = effects(np.concatenate([score_AS1, loss_ASG], axis=2))
        rows: list[dict[str, Any]] = []
        for i, arm in enumerate(arms[1:]):
            row: dict[str, Any] = {"arm": arm, "epochs": done[f"{arm} #0"].epochs}
            for group, mean, half in zip(["target", *groups], mean_G[i], half_G, strict=True):
                row[group], row[f"{group}_interval"] = float(mean), float(half)
            rows.append(row)
        return Conclusion(rows=rows, notes=tuple(self._decay(loss_ASG.mean(1), arms, groups)))

    def _decay(self, loss_AG: np.ndarray, arms: list[str], groups: list[str]) -> list[str]:
        years, named = sorted(self.config.cutoffs), [*self.groups()]
        if not years:
            return []
        rows = [arms.index(f"before {y:g}") for y in years]
        table = loss_AG[np.ix_(rows, [groups.index(g) for g in named])]
        middles = np.array([(g.low + g.high) / 2 for g in self.groups().values()])
        slope, r, p = decay(table, np.array(years), middles)
        return [f"temporal decay {slope:+.4f} bits per byte for each year past the cutoff, r {r:.2f}, p {p:.2g}"]


def cut(setting: Setting, column: str, fraction: float, high: bool) -> Between:
    """The documents with the highest (or lowest) numbers, until `fraction` of the tokens is reached."""
    if column not in setting.columns:
        raise UserError(f"no document has a number {column!r}; curate with a step that writes it (score, attribute)")
    values_N, tokens_N = setting.columns[column]
    order = np.argsort(-values_N if high else values_N, kind="stable")
    reached = np.cumsum(tokens_N[order]) >= fraction * tokens_N.sum() - 1e-9
    edge = float(values_N[order][int(np.argmax(reached))])
    return Between(column=column, low=edge) if high else Between(column=column, high=float(np.nextafter(edge, np.inf)))


def effects(loss_ASG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean difference to the first arm, (A - 1) x G; half of its 95% interval, G). Axes: arms, seeds, groups.

    The spread of the paired differences is pooled over arms, so that two seeds already give an interval.
    """
    from scipy.stats import t

    difference = loss_ASG[1:] - loss_ASG[:1]
    arms, seeds = difference.shape[:2]
    mean = difference.mean(1)
    freedom = arms * (seeds - 1)
    spread = np.sqrt(((difference - mean[:, None]) ** 2).sum((0, 1)) / freedom)
    return mean, t.ppf(0.975, freedom) * spread / math.sqrt(seeds)


def decay(loss_CY: np.ndarray, cutoffs_C: np.ndarray, years_Y: np.ndarray) -> tuple[float, float, float]:
    """(slope, Pearson's r, p) of the loss against years past the cutoff, each year's mean over cutoffs taken out: what
    makes a year hard is not the model's age. Years before a cutoff do not count."""
    from scipy.stats import linregress

    past_CY = years_Y[None] - cutoffs_C[:, None]
    later = past_CY > 0
    x, y = [], []
    for j in np.flatnonzero(later.sum(0) >= 2):
        at = later[:, j]
        x += [*(past_CY[at, j] - past_CY[at, j].mean())]
        y += [*(loss_CY[at, j] - loss_CY[at, j].mean())]
    if len(x) < 2:
        return 0.0, 0.0, 1.0
    fit = linregress(x, y)
    return float(fit.slope), float(fit.rvalue), float(fit.pvalue)
