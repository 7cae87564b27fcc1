"""cmr: how large a share of domain text continual pretraining may hold before general ability suffers.

    domain loss    dL(T) = a1 T^s1 + b1                 change against the model before; T in units of 0.2 Gtok
    general loss   dL(T) = a2 T^s2 + a3 T^s3 + b2       rises first, falls later: two powers
    feasible       dL_general(T_max) <= epsilon         at the end of all tokens that may be spent
    critical       the largest feasible domain fraction; over T:  R(T) = a4 T^s4 + b3

The general curve is fitted for each ratio (`ratio` is the DOMAIN share), the exponents on a grid and ordered by
construction, the linear part solved exactly, since two powers are ill-conditioned. Between ratios the change is
interpolated and made to rise with the ratio. `critical_ratio` gives the share with an interval.

Gu et al. 2024, arXiv:2407.17467 (EMNLP 2024), equations 6 and 8, definitions 1 and 2. Departs: the estimation is this
project's; the interval resamples the residuals of each curve. The paper fits and tests on one run length;
extrapolating in T is what `predict` does and what should be checked. Re-warming the learning rate alone raises general
loss: give `ratio=0` rows as a control to see how much.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.fit import Fit, Prediction
from modicum.laws.forms import Law
from modicum.laws.table import Runs, as_table

CLAIM = {"figure": "29.8% (460M) to 47.8% (3.1B) finance text", "where": "Table 2", "scale": "460M to 3.1B, 20B tokens"}
EXPONENTS = np.array([-1.0, -0.7, -0.5, -0.3, -0.15, 0.15, 0.3, 0.5, 0.7])
DRAWS = 200


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of the critical mixture ratio."""

    epsilon: float = 0.05  # nats of general loss that may be lost
    unit: float = 2e8  # tokens of one T

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or self.unit <= 0:
            raise ValueError("epsilon and unit must be above 0")


class Cmr(Law):
    config: Config
    target = "change"
    columns = ("ratio", "tokens")

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        """Rows of general loss, less that of the model before, along runs of several domain shares."""
        table = as_table(runs, self.columns, target="change")
        ratios = np.unique(table["ratio"])
        if (ratios > 1).any():
            raise UserError(f"ratio {ratios.max():g} is no share from 0 to 1")
        if len(ratios) < 2:
            raise UserError("runs of at least two domain shares are needed; the table holds one")
        rng, curves = np.random.default_rng(seed), []
        for ratio in ratios:
            at = table["ratio"] == ratio
            if at.sum() < 4:
                raise UserError(f"ratio {ratio:g} has {int(at.sum())} rows; a curve of general loss needs at least 4")
            order = np.argsort(table["tokens"][at], kind="stable")
            t_N, change_N = table["tokens"][at][order] / self.config.unit, table["change"][at][order]
            best = two_powers(t_N, change_N)
            left_N = change_N - _value(best, t_N)
            freedom = max(len(t_N) - 3, 1)
            left_N = left_N * np.sqrt(len(t_N) / freedom)
            drawn = [two_powers(t_N, _value(best, t_N) + rng.permutation(left_N)).tolist() for _ in range(DRAWS)]
            curves.append({"ratio": float(ratio), "best": best.tolist(), "draws": drawn, "spread": float(left_N.std())})
        return Fit(
            law="cmr",
            target="change",
            parameters={f"change_at_{c['ratio']:.3g}": float(_value(np.array(c["best"]), t_N[-1:])[0]) for c in curves},
            points=len(table["tokens"]),
            runs=len(ratios),
            seed=seed,
            method="residuals",
            range={"tokens": (float(table["tokens"].min()), float(table["tokens"].max()))},
            residual=float(np.mean([c["spread"] for c in curves])),
            knobs=dataclasses.asdict(self.config),
            extra={"curves": curves},
        )

    def _changes(self, fit: Fit, t_N: np.ndarray, draw: int | None) -> np.ndarray:
        """General change (ratios x N), made to rise with the ratio."""
        rows = [_value(np.array(c["best"] if draw is None else c["draws"][draw]), t_N) for c in fit.extra["curves"]]
        risen: np.ndarray = _rising(np.stack(rows))
        return risen

    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        table = as_table(points, self.columns, target=None)
        ratios = np.array([c["ratio"] for c in fit.extra["curves"]])
        if ((table["ratio"] < ratios[0] - 1e-9) | (table["ratio"] > ratios[-1] + 1e-9)).any():
            raise UserError(f"ratios from {ratios[0]:g} to {ratios[-1]:g} were fitted; others cannot be interpolated")
        t_N = table["tokens"] / self.config.unit

        def at(draw: int | None) -> np.ndarray:
            grid = self._changes(fit, t_N, draw)
            return np.array([np.interp(r, ratios, grid[:, i]) for i, r in enumerate(table["ratio"])])

        rng = np.random.default_rng(fit.seed + 1)
        spread = max(fit.residual, 1e-6)
        beyond_N = np.maximum(np.log10(table["tokens"] / fit.range["tokens"][1]), 0)
        drawn_KN = np.stack([at(k) for k in range(DRAWS)])
        mean_N = at(None)
        noise_KN = rng.normal(size=(10, DRAWS, 1)) * spread
        drift_KN = (
            rng.normal(size=(10, DRAWS, 1)) * (0.3 * np.abs(mean_N) + spread) * beyond_N
        )  # of the form, per decade
        low_N, high_N = fit.interval((drawn_KN + noise_KN + drift_KN).reshape(-1, len(t_N)), level)
        return Prediction(mean_N, low_N, high_N, level)

    def critical_ratio(self, fit: Fit, tokens: float, level: float = 0.95) -> dict[str, float]:
        """The largest domain share whose general loss has risen by at most epsilon after `tokens`: ratio, low, high.

        0 where no fitted share is feasible, the largest one fitted (or 1) where all are; `censored` says that it is a
        bound.
        """
        ratios = np.array([c["ratio"] for c in fit.extra["curves"]])
        t = np.array([tokens / self.config.unit])
        crossings = [
            crossing(ratios, self._changes(fit, t, draw)[:, 0], self.config.epsilon) for draw in (None, *range(DRAWS))
        ]
        low, high = np.quantile(crossings[1:], [(1 - level) / 2, (1 + level) / 2])
        censored = float(crossings[0] <= ratios[0] or crossings[0] >= ratios[-1])
        return {"ratio": crossings[0], "low": float(low), "high": float(high), "censored": censored}

    def curve(self, fit: Fit, tokens: list[float]) -> dict[str, float]:
        """R(T) = a4 T^s4 + b3 through the critical ratios at several T, by least squares on a grid of s4."""
        t_N = np.array(tokens) / self.config.unit
        r_N = np.array([self.critical_ratio(fit, d)["ratio"] for d in tokens])
        fits = []
        for power in np.linspace(-1.5, 1.0, 51)[np.abs(np.linspace(-1.5, 1.0, 51)) > 1e-9]:
            basis = np.stack([t_N**power, np.ones_like(t_N)], axis=1)
            solved = np.linalg.lstsq(basis, r_N, rcond=None)[0]
            fits.append((float(((basis @ solved - r_N) ** 2).sum()), power, *solved))
        _, power, scale, offset = min(fits)
        return {"a4": float(scale), "s4": float(power), "b3": float(offset)}

    def simulate(self, rng: np.random.Generator, *, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        def rows(ratios: list[float], t: np.ndarray, noise: float) -> dict[str, Any]:
            r, at = (v.ravel() for v in np.meshgrid(ratios, t, indexing="ij"))
            change = r * (0.30 - 0.25 * at**-0.5) - 0.012 * at**0.3
            return {
                "ratio": r,
                "tokens": at * 2e8,
                "change": change + noise * 0.3 * rng.normal(size=len(at)),
            }

        runs = rows([0.125, 0.25, 0.5, 0.75], np.geomspace(2, 50, 24), noise)
        return runs, rows([0.25, 0.375, 0.6], np.array([40.0, 70.0]), 0.0)


def two_powers(t_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """[a2, s2, a3, s3, b2] with s2 < s3 on the grid: the least squares fit, by the linear part solved for each pair."""
    best, least = np.zeros(5), np.inf
    for i, low in enumerate(EXPONENTS):
        for high in EXPONENTS[i + 1 :]:
            basis_N3 = np.stack([t_N**low, t_N**high, np.ones_like(t_N)], axis=1)
            scale_3 = np.linalg.norm(basis_N3, axis=0)
            # a little ridge keeps two nearly parallel powers from cancelling each other at huge weights
            gram = (basis_N3 / scale_3).T @ (basis_N3 / scale_3) + 1e-7 * np.eye(3)
            solved = np.linalg.solve(gram, (basis_N3 / scale_3).T @ y_N) / scale_3
            misfit = float(((basis_N3 @ solved - y_N) ** 2).sum())
            if misfit < least:
                best, least = np.array([solved[0], low, solved[1], high, solved[2]]), misfit
    return best


def _value(p: np.ndarray, t_N: np.ndarray) -> np.ndarray:
    value_N: np.ndarray = p[0] * t_N ** p[1] + p[2] * t_N ** p[3] + p[4]
    return value_N


def _rising(change_RN: np.ndarray) -> np.ndarray:
    """The nearest values that do not fall with the ratio (pool adjacent violators), column by column."""
    result = change_RN.copy()
    for n in range(result.shape[1]):
        blocks: list[list[float]] = []
        for value in result[:, n]:
            blocks.append([float(value), 1])
            while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
                (a, i), (b, j) = blocks.pop(-2), blocks.pop()
                blocks.append([(a * i + b * j) / (i + j), i + j])
        result[:, n] = [value for value, count in blocks for _ in range(int(count))]
    return result


def crossing(ratios: np.ndarray, change_R: np.ndarray, epsilon: float) -> float:
    """The ratio at which a rising change reaches epsilon; 0 before the first, the last (1 if it is flat) after."""
    if change_R[0] > epsilon:
        return 0.0
    if change_R[-1] <= epsilon:
        return 1.0 if change_R[-1] <= 0 else float(ratios[-1])
    i = int(np.flatnonzero(change_R > epsilon)[0])
    part = (epsilon - change_R[i - 1]) / (change_R[i] - change_R[i - 1])
    return float(ratios[i - 1] + part * (ratios[i] - ratios[i - 1]))
