"""fine-line: a larger model's score along training from a smaller one's at equal tokens, where their curves agree.

    s_large(D) = g + k (s_small(D) - g)

Tasks have curves of score against tokens whose shape several sizes share. k comes from the first part of the large
run, the interval from the residuals there. It refuses where the two sizes' curves do not rank alike (Spearman below
`agreement` over common tokens) or where the small one never leaves chance: two flat curves agree in nothing.
`dynamics` gives the figures of the study for one task: agreement of shape, the tokens of onset, the slope in log
tokens; `coupling` correlates the steps of two tasks.

Yang et al. 2024, arXiv:2404.01204 (The Fine Line), abstract and outline: a study of released checkpoints of 7B to 67B
models. The statistics and the predictor are this project's. Compare at equal tokens, not steps; errors come before any
smoothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from modicum.core.errors import UserError
from modicum.laws.fit import Fit, Prediction
from modicum.laws.forms import Law
from modicum.laws.table import Runs, as_table

CLAIM = {
    "figure": "certain tasks show similar training dynamics across sizes",
    "where": "abstract",
    "scale": "up to 67B",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of the transfer of a curve."""

    chance: float = 0.0  # g: what guessing scores
    after: float = 2e9  # tokens before which checkpoints say little (1,000 steps of two million)
    agreement: float = 0.5  # least Spearman correlation of the two curves
    noise: float = 0.01  # least spread of a checkpoint's score about its curve, absolute

    def __post_init__(self) -> None:
        if not 0 <= self.chance < 1 or self.noise <= 0 or not -1 <= self.agreement < 1:
            raise ValueError("chance must be a share below 1, noise above 0, agreement a correlation below 1")


class FineLine(Law):
    config: Config
    checkpoints = True
    target = "score"
    columns = ("parameters", "tokens")

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        """Two sizes of one task: the smaller one's whole run, the larger one's beginning."""
        table = as_table(runs, self.columns, target="score")
        sizes = np.unique(table["parameters"])
        if len(sizes) < 2:
            raise UserError("a curve is carried over from a smaller to a larger model; the table holds one size")
        small, large = (curve(table, size, self.config.after) for size in sizes[-2:])
        last = small[0].max(initial=0.0) * 1.001
        shared = large[0][(large[0] >= small[0].min(initial=last) * 0.999) & (large[0] <= last)]
        if len(shared) < 3:
            raise UserError(
                f"{len(shared)} checkpoints of {sizes[-1]:.3g} parameters lie within the {sizes[-2]:.3g} run after "
                f"{self.config.after:.3g} tokens; at least 3 are needed"
            )
        large_S = np.interp(np.log(shared), np.log(large[0]), large[1])
        small_S = np.interp(np.log(shared), np.log(small[0]), small[1])
        error = _error(table, self.config)
        if small[1].max() < self.config.chance + 2 * error:
            raise UserError(
                f"the smaller model stays at chance ({self.config.chance:.0%}; its best is {small[1].max():.1%}): "
                "nothing can be carried over"
            )
        agreement = shape(shared, large_S, small_S)
        if agreement < self.config.agreement:
            raise UserError(
                f"the two curves rank alike by {agreement:.2f} only (at least {self.config.agreement} is asked for); "
                "this task does not develop alike at these sizes"
            )
        above_S, g = small_S - self.config.chance, self.config.chance
        k = float((above_S * (large_S - g)).sum() / (above_S**2).sum())
        left_S = large_S - g - k * above_S
        spread = max(float(np.sqrt((left_S**2).sum() / (len(left_S) - 1))), self.config.noise)
        return Fit(
            law="fine_line",
            target="score",
            parameters={"k": k, "g": g, "agreement": agreement, "spread": spread},
            points=len(table["score"]),
            runs=2,
            seed=seed,
            method="residuals",
            range={"tokens": (float(shared.min()), float(shared.max()))},
            residual=float(np.abs(left_S).mean()),
            knobs=dataclasses.asdict(self.config),
            extra={
                "tokens": small[0].tolist(),
                "score": small[1].tolist(),
                "k_error": spread / float(np.sqrt((above_S**2).sum())),
            },
        )

    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        from scipy.stats import t

        table = as_table(points, ("tokens",), target=None)
        known, p = np.array(fit.extra["tokens"]), fit.parameters
        if (table["tokens"] > known[-1] * 1.001).any():
            raise UserError(f"the smaller run ends at {known[-1]:.3g} tokens; its curve says nothing beyond")
        above_N = np.interp(np.log(table["tokens"]), np.log(known), fit.extra["score"]) - p["g"]
        mean_N = np.clip(p["g"] + p["k"] * above_N, 0, 1)
        decades_N = np.maximum(np.log10(table["tokens"] / fit.range["tokens"][1]), 0)
        # k may drift: by a tenth of the gain per decade of tokens beyond the part that was seen
        sd_N = np.sqrt(
            p["spread"] ** 2 + (above_N * fit.extra["k_error"]) ** 2 + (0.1 * p["k"] * above_N * decades_N) ** 2
        )
        wide_N = sd_N * t.ppf((1 + level) / 2, max(fit.points // 4, 3))
        return Prediction(mean_N, np.clip(mean_N - wide_N, 0, 1), np.clip(mean_N + wide_N, 0, 1), level)

    def simulate(self, rng: np.random.Generator, *, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        tokens = np.geomspace(3e9, 3e11, 16)
        small = 0.1 + 0.5 * np.exp(-8.0 * (tokens / 1e9) ** -0.5)
        early = 7
        large = 1.3 * small
        rows = {
            "parameters": [4e8] * 16 + [3e9] * early,
            "tokens": [*tokens, *tokens[:early]],
            "score": np.clip([*small, *large[:early]] + noise * rng.normal(size=16 + early), 0, 1),
        }
        heldout = {"parameters": [3e9] * (16 - early), "tokens": tokens[early:], "score": large[early:]}
        return rows, heldout


def curve(table: dict[str, np.ndarray], size: float, after: float) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mean score) of one size, rising, after the first `after` tokens."""
    picked = (table["parameters"] == size) & (table["tokens"] >= after)
    tokens = np.unique(table["tokens"][picked])
    return tokens, np.array([table["score"][picked & (table["tokens"] == d)].mean() for d in tokens])


def shape(tokens: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of two curves over common tokens; 0 where one does not move."""
    if len(tokens) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def _error(table: dict[str, np.ndarray], config: Config) -> float:
    items = float(np.median(table["items"]))
    return float(np.sqrt(config.noise**2 + config.chance * (1 - config.chance) / items))


def dynamics(runs: Runs, *, chance: float, after: float = 2e9) -> dict[str, Any]:
    """One task over sizes: agreement of each size's curve with the largest one's, onset and slope of each.

    onset: tokens of the first score above chance by two standard errors (binomial, from `items`), None if there is
    none; slope: change of score per factor of e in tokens, from there on.
    """
    table = as_table(runs, ("parameters", "tokens"), target="score")
    sizes = np.unique(table["parameters"])
    top = curve(table, sizes[-1], after)
    error = float(np.sqrt(max(chance * (1 - chance), 1e-4) / float(np.median(table["items"]))))
    curves = []
    for size in sizes:
        tokens, score = curve(table, size, after)
        shared = np.intersect1d(tokens, top[0])
        agrees = shape(shared, score[np.isin(tokens, shared)], top[1][np.isin(top[0], shared)])
        above = np.flatnonzero(score > chance + 2 * error)
        onset = float(tokens[above[0]]) if len(above) else None
        slope = float(np.polyfit(np.log(tokens[above[0] :]), score[above[0] :], 1)[0]) if len(above) > 2 else None
        curves.append({"parameters": float(size), "agreement": agrees, "onset": onset, "slope": slope})
    return {"chance": chance, "sizes": curves}


def coupling(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the first differences of two tasks' scores along one run: do they rise together?"""
    steps = np.diff(np.asarray(a, float)), np.diff(np.asarray(b, float))
    if len(steps[0]) < 3 or np.ptp(steps[0]) == 0 or np.ptp(steps[1]) == 0:
        return 0.0
    return float(np.corrcoef(*steps)[0, 1])
