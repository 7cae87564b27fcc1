"""A law that is a curve of a few parameters: estimation, intervals and the best split of a budget, for all of them.

A form says: the columns it reads, its coordinates (any real number is valid), the curve as a function of them and
priors. The curve is the log of the loss where the target is a loss, else the score or the change itself.

Letters: K draws, P coordinates, Q reported parameters, N rows.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from modicum.core.errors import UserError
from modicum.laws import estimate
from modicum.laws.fit import Fit, Optimum, Prediction
from modicum.laws.forms import Law
from modicum.laws.table import FLOPS_PER_PARAMETER_TOKEN, ZERO_ALLOWED, Runs, Table, as_table, observed, to_columns

log = logging.getLogger(__name__)
MAX_ROWS_PER_RUN = 24  # checkpoints of a longer run are thinned to this many, evenly in log tokens


class CurveLaw(Law):
    """Base of the laws that are curves; see the module for what a form has to say."""

    coordinates: ClassVar[tuple[str, ...]]
    upper: ClassVar[dict[str, float]] = {}  # largest sensible value of a coordinate; see estimate.Prior
    example: ClassVar[dict[str, float]]  # parameters that runs of 1e7 to 1e9 parameters determine: conformance
    small_example: ClassVar[dict[str, float]]  # a plausible law of runs of about 1e6 parameters and tokens

    # What a form says -----------------------------------------------------------------------------

    @abstractmethod
    def curve(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        """Log loss, score or change, KN, at rows `x`, columns divided by their reference (1 is the middle)."""

    def gradient(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        """d curve / d theta, shape KNP; by central differences unless a form has it in closed form."""
        step, slopes = 1e-5, []
        for p in range(theta_KP.shape[1]):
            shift = np.zeros(theta_KP.shape[1])
            shift[p] = step
            slopes.append((self.curve(theta_KP + shift, x) - self.curve(theta_KP - shift, x)) / (2 * step))
        return np.stack(slopes, axis=2)

    @abstractmethod
    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (P each) of normal priors on the coordinates."""

    @abstractmethod
    def starts(self, x: Table) -> np.ndarray:
        """Starting points SP, best first."""

    @abstractmethod
    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        """Reported parameters (each of shape K) from the coordinates."""

    @abstractmethod
    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        """The inverse for one set of parameters: theta_P."""

    def toy_points(self, n: int = 6, scale: float = 1.0) -> dict[str, np.ndarray]:
        """Points at which the conformance suite draws runs: n sizes at n token counts each."""
        sizes, tokens = np.meshgrid(scale * np.geomspace(1e7, 1e9, n), scale * np.geomspace(2e8, 2e10, n))
        return {"parameters": sizes.ravel(), "tokens": tokens.ravel(), "flops": 6 * sizes.ravel() * tokens.ravel()}

    def reference_of(self, table: Table) -> dict[str, float]:
        """What each column is divided by: its geometric mean, so that coordinates are nearly uncorrelated."""
        return {n: 1.0 if _may_be_zero(n) else float(np.exp(np.log(table[n]).mean())) for n in self.reads}

    def check_rows(self, runs: dict[str, Any], table: Table) -> None:
        """Refuse rows that this law does not describe, naming the flag that takes them all the same."""
        if getattr(self.config, "mixed", True):
            return
        schedules = {str(v) for v in runs.get("schedule", []) if v is not None}
        if len(schedules) > 1:
            raise UserError(
                f"rows of the schedules {', '.join(sorted(schedules))} do not lie on one law; fit one of them, or all "
                "with mixed=true"
            )
        if {"unique_tokens", "tokens"} <= runs.keys() and "unique_tokens" not in self.reads and "tokens" in table:
            unique_N = as_table(runs, ("unique_tokens",), target=None)["unique_tokens"]
            epochs = float((table["tokens"] / unique_N).max())
            if epochs > 4:  # up to four passes cost little (Muennighoff et al. 2023, arXiv:2305.16264)
                raise UserError(
                    f"data repeated {epochs:.1f} times is outside this law; use token-crisis, or mixed=true to fit "
                    "it all the same"
                )

    def best_split(self, theta_KP: np.ndarray, reference: dict[str, float], flops: float) -> np.ndarray:
        """The parameters N_K that minimise the loss at flops = 6 N D, for each draw.

        By a search over sizes, refined by a parabola; a form with a closed solution overrides it.
        """
        total = np.log(flops / FLOPS_PER_PARAMETER_TOKEN)
        log_n_G = np.linspace(0.0, total, 2000)
        loss_KG = self.curve(
            theta_KP,
            {
                "parameters": np.exp(log_n_G) / reference["parameters"],
                "tokens": np.exp(total - log_n_G) / reference["tokens"],
            },
        )
        step, near = log_n_G[1], loss_KG.argmin(1)
        middle = near.clip(1, len(log_n_G) - 2)
        rows = np.arange(len(theta_KP))
        before, here, after = (loss_KG[rows, middle + shift] for shift in (-1, 0, 1))
        bend = before - 2 * here + after
        best = log_n_G[middle] + step * np.where(bend > 0, (before - after) / (2 * np.maximum(bend, 1e-300)), 0)
        return np.exp(np.where(near == middle, best, log_n_G[near]))

    # What is common -------------------------------------------------------------------------------

    def value(self, parameters: dict[str, float], points: Runs) -> np.ndarray:
        """The law's loss, score or change (N) at `points` for given parameters, without noise."""
        table = as_table(points, self.reads, target=None)
        reference = {name: 1.0 for name in self.reads}
        return self.unlink(self.curve(self.from_parameters(parameters, reference)[None], table))[0]

    def unlink(self, values: np.ndarray) -> np.ndarray:
        """The target from values of the curve: the loss from its log, a score within 0 and 1."""
        if self.target == "loss":
            return np.exp(values)
        return np.clip(values, 0, 1) if self.target == "score" else values

    def simulate(self, rng: np.random.Generator, *, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        points = self.toy_points()
        clean = self.value(self.example, points)
        if self.target == "score" and noise:
            items = round(0.25 / noise**2)
            given = points | {"score": rng.binomial(items, clean) / items, "items": np.full(len(clean), items)}
        else:
            error = noise * rng.normal(size=len(clean))
            given = points | {self.target: clean * np.exp(error) if self.target == "loss" else clean + error}
        far = {n: v[-4:] for n, v in self.toy_points(scale=4.0).items()}
        return given, far | {self.target: self.value(self.example, far)}

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        """Fit the law to run records.

        Raises UserError for a missing column, fewer than 2 runs, or prior="none" with too few runs.
        """
        given = to_columns(runs)
        table = as_table(given, self.reads, target=self.target)
        self.check_rows(given, table)
        table = thin(table)
        n_runs, n_coordinates = int(table["run"].max()) + 1, len(self.coordinates)
        needed = 2 if self.config.prior == "published" else n_coordinates + 2
        if n_runs < needed and not (n_runs == 1 and len(table["run"]) >= needed):
            raise UserError(
                f"{n_runs} run(s) cannot determine {n_coordinates} parameters with prior="
                f"{self.config.prior}; give at least {needed} runs"
                + ("" if self.config.prior == "published" else ", or use prior=published")
            )
        for name in self.reads:
            if len(table["run"]) > 2 and np.ptp(table[name]) == 0:
                log.warning("column %s is constant: how the %s depends on it is the prior's", name, self.target)
        reference = self.reference_of(table)
        x = {name: column / reference[name] if name in reference else column for name, column in table.items()}
        x["observed"] = observed(table, self.target)
        if self.target == "score":
            x["spread"] = self._spread(table["score"], table["items"])
        problem = self._problem(x)
        starts_SP = self.starts(x)
        rest = np.log([self.config.gap, self.config.noise, self.config.noise])
        starts_KF = np.column_stack([starts_SP, np.tile(rest, (len(starts_SP), 1))])
        best_KF, value_K = estimate.minimise(problem, starts_KF)
        best_F = best_KF[value_K.argmin()]
        rng = np.random.default_rng(seed)
        by_bootstrap = self.config.interval == "bootstrap" or (
            self.config.interval == "auto" and n_runs >= self.config.bootstrap_from
        )
        if by_bootstrap:
            draws_KF = estimate.bootstrap(problem, best_F, rng, n_draws=min(self.config.draws, 200))
        else:
            draws_KF = estimate.sample_posterior(problem, best_F, rng, n_draws=self.config.draws)
        draws_KP = draws_KF[:, :n_coordinates]
        best = self.to_parameters(best_F[None, :n_coordinates], reference)
        drawn = self.to_parameters(draws_KP, reference)
        mean_KR, deviation_KN = problem.residuals(best_F[None])
        residual_KN = mean_KR if problem.single else mean_KR[:, problem.run_N] + deviation_KN
        return Fit(
            law=type(self).__module__.rsplit(".", 1)[-1],
            target=self.target,
            parameters={k: float(v[0]) for k, v in best.items()},
            covariance_QQ=np.cov(np.stack(list(drawn.values()))),
            best_P=best_F[:n_coordinates],
            draws_KP=draws_KP,
            noise_K=np.exp(draws_KF[:, n_coordinates + 1]),
            within_K=np.exp(draws_KF[:, n_coordinates + 2]) * (not problem.single),
            coordinates=self.coordinates,
            reference=reference,
            range={n: (float(table[n].min()), float(table[n].max())) for n in self.reads},
            method="bootstrap" if by_bootstrap else "posterior",
            points=len(table["run"]),
            runs=n_runs,
            seed=seed,
            gap=float(np.exp(best_F[n_coordinates])) if x["decay_left"].any() else 0.0,
            residual=float(np.abs(residual_KN * problem.spread_N).mean()),
            knobs=dataclasses.asdict(self.config),
        )

    def _spread(self, score_N: np.ndarray, items_N: np.ndarray) -> np.ndarray:
        """How much wider a score of few items is than `noise` alone: sqrt(1 + binomial variance / (2 noise^2))."""
        inner_N = score_N.clip(0.05, 0.95)
        return np.sqrt(1 + inner_N * (1 - inner_N) / items_N / (2 * self.config.noise**2))

    def _problem(self, x: Table) -> estimate.Problem:
        mean_P, sd_P = self.priors(x)
        if self.config.prior == "none":
            sd_P = np.full_like(sd_P, np.inf)
        # The gap is known to within a factor of seven, the scales to within a factor of four (95%).
        rest = np.log([self.config.gap, self.config.noise, self.config.noise])
        upper = [self.upper.get(name, np.inf) for name in self.coordinates]
        prior = estimate.Prior(
            np.concatenate([mean_P, rest]), np.concatenate([sd_P, [1.0, 0.7, 0.7]]), np.array([*upper, *[np.inf] * 3])
        )
        return estimate.Problem(self.curve, self.gradient, x, prior, self.config.delta, self.config.per_run)

    def curve_at(self, fit: Fit, points: Runs) -> np.ndarray:
        """The curve (log loss, score or change) of each draw at `points`, KN: the law alone, without noise."""
        table = as_table(points, self.reads, target=None)
        return self.curve(fit.draws_KP, {name: table[name] / fit.reference[name] for name in self.reads})

    def drift_at(self, fit: Fit, points: Runs) -> np.ndarray:
        """Standard deviation (N) of the form's own error at `points`: `drift` for each decade outside the range."""
        drift_N: np.ndarray = self.config.drift * decades_outside(as_table(points, self.reads, target=None), fit.range)
        return drift_N

    def sample(self, fit: Fit, points: Runs) -> np.ndarray:
        """What new runs at `points` may reach (many draws, N): the law's spread, a run's, and the form's drift."""
        table = as_table(points, self.reads, target=None)
        curve_KN = self.curve_at(fit, points)
        rng = np.random.default_rng(fit.seed + 1)
        repeats = max(1, 4000 // len(fit.draws_KP))
        curve_KN = np.repeat(curve_KN, repeats, axis=0)
        scale_K = np.repeat(fit.noise_K, repeats)
        error_K = estimate.draw_noise(scale_K, self.config.delta, rng)
        if fit.within_K.any():
            error_K = error_K + estimate.draw_noise(np.repeat(fit.within_K, repeats), self.config.delta, rng)
        drift_KN = rng.normal(size=len(scale_K))[:, None] * self.drift_at(fit, points)
        spread_N = self._spread(curve_KN.mean(0), table["items"]) if self.target == "score" else 1.0
        return self.unlink(curve_KN + error_K[:, None] * spread_N + drift_KN)

    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        """The target of a new, finished run at each of `points`: a prediction interval.

        It holds the draws' spread, the spread of single runs about the law (and of one measurement about its
        run's mean, where runs have several rows), and `drift` for each decade outside the fitted range.
        """
        if not 0 < level < 1:
            raise UserError(f"level={level} is not between 0 and 1; write for example 0.95")
        low_N, high_N = fit.interval(self.sample(fit, points), level)
        # The middle: a resample with a steep exponent explodes at points with few tokens, and the mean with it.
        return Prediction(self.unlink(np.median(self.curve_at(fit, points), axis=0)), low_N, high_N, level)

    def optimum(self, fit: Fit, flops: float, level: float = 0.95) -> Optimum:
        """The split of `flops` = 6 N D into parameters N and tokens D that reaches the lowest loss."""
        if set(self.reads) != {"parameters", "tokens"} or self.target != "loss":
            return super().optimum(fit, flops, level)
        if not flops > FLOPS_PER_PARAMETER_TOKEN:
            raise UserError(f"a budget of {flops} FLOPs trains nothing; write for example 1e18flop")
        best = float(self.best_split(fit.best_P[None], fit.reference, flops)[0])
        n_K = self.best_split(fit.draws_KP, fit.reference, flops)
        low, high = (float(v) for v in fit.interval(n_K, level))
        total = flops / FLOPS_PER_PARAMETER_TOKEN
        at = self.predict(fit, {"parameters": [best], "tokens": [total / best]}, level)
        return Optimum(
            flops=flops,
            parameters=best,
            tokens=total / best,
            parameters_interval=(low, high),
            tokens_interval=(total / high, total / low),
            loss=float(at.mean[0]),
            loss_interval=(float(at.low[0]), float(at.high[0])),
            level=level,
        )


def _may_be_zero(name: str) -> bool:
    return name in ZERO_ALLOWED or name.startswith("ratio_")


def decades_outside(table: Table, ranges: dict[str, tuple[float, float]]) -> np.ndarray:
    """Decades between each point (N) and the fitted range, over all columns; of shares none, of counts plus one."""
    total = np.zeros(len(next(iter(table.values()))))
    for name, (low, high) in ranges.items():
        if not name.startswith("ratio"):
            plus = 1.0 if _may_be_zero(name) else 0.0
            at_N = np.log10(table[name] + plus)
            total += np.maximum(at_N - np.log10(high + plus), 0) + np.maximum(np.log10(low + plus) - at_N, 0)
    return total


def thin(table: Table) -> Table:
    """At most MAX_ROWS_PER_RUN rows of each run, spread evenly over its log tokens, the last one kept.

    A run without tokens, steps, FLOPs or parameters is spread over the order of its rows.
    """
    keep = np.zeros(len(table["run"]), bool)
    known = next((table[n] for n in ("tokens", "steps", "flops", "parameters") if n in table), None)
    size = np.arange(len(keep), dtype=float) if known is None else np.log(known)
    for run in range(int(table["run"].max()) + 1):
        rows = np.flatnonzero(table["run"] == run)
        if len(rows) > MAX_ROWS_PER_RUN:
            rows = rows[np.argsort(size[rows], kind="stable")]
            wanted = np.linspace(size[rows[0]], size[rows[-1]], MAX_ROWS_PER_RUN)
            rows = rows[np.unique(np.searchsorted(size[rows], wanted).clip(0, len(rows) - 1))]
        keep[rows] = True
    return {name: column[keep] for name, column in table.items()}
