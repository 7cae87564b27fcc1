"""port law: how loss depends on scale: fitted on small runs, it predicts larger ones and spends a budget.

A law is built from its config alone, `fit` takes run records (`laws.table`) and gives a `laws.fit.Fit`.
A form of law says five things: the columns it reads, its coordinates (any real number is valid), the
log loss as a function of them, its gradient, and priors; estimation, intervals and the optimum are common.

Letters: K draws, P coordinates, Q reported parameters, N rows.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from modicum.core.errors import UserError
from modicum.core.registry import Method
from modicum.laws import estimate
from modicum.laws.fit import Fit, Optimum, Prediction
from modicum.laws.table import FLOPS_PER_PARAMETER_TOKEN, Runs, Table, as_table

BASELINE = "chinchilla"
MAX_ROWS_PER_RUN = 24  # checkpoints of a longer run are thinned to this many, evenly in log tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class LawConfig:
    """Knobs every law has.

    prior: "published" adds the form's priors (documented in its card), "none" is the plain robust fit.
    entropy: a typical irreducible loss in the loss's own unit (1.7 nats per token; for bits per byte
        about 0.8): the centre of the prior on E, within a factor of e either way.
    interval: "posterior", "bootstrap", or "auto": bootstrap over runs from `bootstrap_from` runs on.
    noise: prior centre of the relative spread of a run about the law (seed, data order, misfit).
    drift: relative error of the form itself per decade outside the fitted range, one standard deviation;
        0.02 is what the intervals needed on published tables (docs/laws.md).
    """

    delta: float = 1e-3
    prior: str = "published"
    entropy: float = 1.7
    interval: str = "auto"
    bootstrap_from: int = 30
    draws: int = 1000
    noise: float = 0.006
    drift: float = 0.02
    gap: float = 0.03
    per_run: int = 4

    def __post_init__(self) -> None:
        if self.prior not in ("published", "none"):
            raise ValueError(f"prior={self.prior!r}: allowed are published, none")
        if self.interval not in ("auto", "posterior", "bootstrap"):
            raise ValueError(f"interval={self.interval!r}: allowed are auto, posterior, bootstrap")
        if min(self.delta, self.entropy, self.noise, self.gap) <= 0 or self.draws < 50 or self.per_run < 1:
            raise ValueError("delta, entropy, noise and gap must be above 0, draws at least 50, per_run at least 1")


class Law(Method):
    """Base of every law; see the module for what a form has to say."""

    columns: ClassVar[tuple[str, ...]] = ("parameters", "tokens")
    coordinates: ClassVar[tuple[str, ...]]
    example: ClassVar[dict[str, float]]  # parameters that runs of 1e7 to 1e9 parameters determine: conformance
    small_example: ClassVar[dict[str, float]]  # a plausible law of runs of about 1e6 parameters and tokens

    def __init__(self, config: Any):
        self.config = config

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns this law reads with its present knobs."""
        return self.columns

    # What a form says -----------------------------------------------------------------------------

    @abstractmethod
    def log_loss(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        """log loss_KN at rows `x`, whose columns are divided by their reference (so 1 is the middle)."""

    @abstractmethod
    def gradient(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        """d log loss / d theta, shape KNP."""

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

    def best_split(self, theta_KP: np.ndarray, reference: dict[str, float], flops: float) -> np.ndarray:
        """The parameters N_K that minimise the loss at flops = 6 N D, for each draw.

        By a search over sizes, refined by a parabola; a form with a closed solution overrides it.
        """
        total = np.log(flops / FLOPS_PER_PARAMETER_TOKEN)
        log_n_G = np.linspace(0.0, total, 2000)
        loss_KG = self.log_loss(
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
        found = log_n_G[middle] + step * np.where(bend > 0, (before - after) / (2 * np.maximum(bend, 1e-300)), 0)
        return np.exp(np.where(near == middle, found, log_n_G[near]))

    # What is common -------------------------------------------------------------------------------

    def value(self, parameters: dict[str, float], points: Runs) -> np.ndarray:
        """The law's loss (N) at `points` for given parameters, without noise."""
        table = as_table(points, self.reads, loss=False)
        reference = {name: 1.0 for name in self.reads}
        return np.exp(self.log_loss(self.from_parameters(parameters, reference)[None], table)[0])

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        """Fit the law to run records.

        Raises UserError for a missing column, fewer than 2 runs, or prior="none" with too few runs.
        """
        table = _thin(as_table(runs, self.reads))
        n_runs, n_coordinates = int(table["run"].max()) + 1, len(self.coordinates)
        needed = 2 if self.config.prior == "published" else n_coordinates + 2
        if n_runs < needed and not (n_runs == 1 and len(table["loss"]) >= needed):
            raise UserError(
                f"{n_runs} run(s) cannot determine {n_coordinates} parameters with prior="
                f"{self.config.prior}; give at least {needed} runs"
                + ("" if self.config.prior == "published" else ", or use prior=published")
            )
        reference = {name: float(np.exp(np.log(table[name]).mean())) for name in self.reads}
        x = {name: table[name] / reference[name] for name in self.reads} | {
            name: table[name] for name in ("loss", "run", "final")
        }
        problem = self._problem(x)
        starts_SP = self.starts(x)
        rest = np.log([self.config.gap, self.config.noise, self.config.noise])
        starts_KF = np.column_stack([starts_SP, np.tile(rest, (len(starts_SP), 1))])
        found_KF, value_K = estimate.minimise(problem, starts_KF)
        best_F = found_KF[value_K.argmin()]
        rng = np.random.default_rng(seed)
        by_bootstrap = self.config.interval == "bootstrap" or (
            self.config.interval == "auto" and n_runs >= self.config.bootstrap_from
        )
        if by_bootstrap:
            draws_KF = estimate.bootstrap(problem, best_F, rng, n_draws=min(self.config.draws, 200))
        else:
            draws_KF = estimate.sample_posterior(problem, best_F, rng, n_draws=self.config.draws)
        draws_KP = draws_KF[:, :n_coordinates]
        found = self.to_parameters(best_F[None, :n_coordinates], reference)
        drawn = self.to_parameters(draws_KP, reference)
        mean_KR, deviation_KN = problem.residuals(best_F[None])
        residual = np.abs(mean_KR if problem.single else mean_KR[:, problem.run_N] + deviation_KN).mean()
        return Fit(
            law=type(self).__module__.rsplit(".", 1)[-1],
            parameters={k: float(v[0]) for k, v in found.items()},
            covariance_QQ=np.cov(np.stack(list(drawn.values()))),
            best_P=best_F[:n_coordinates],
            draws_KP=draws_KP,
            noise_K=np.exp(draws_KF[:, n_coordinates + 1]),
            within_K=np.exp(draws_KF[:, n_coordinates + 2]) * (not problem.single),
            coordinates=self.coordinates,
            reference=reference,
            range={n: (float(table[n].min()), float(table[n].max())) for n in self.reads},
            method="bootstrap" if by_bootstrap else "posterior",
            points=len(table["loss"]),
            runs=n_runs,
            seed=seed,
            gap=float(np.exp(best_F[n_coordinates])) if not x["final"].all() else 0.0,
            residual=float(residual),
            knobs=dataclasses.asdict(self.config),
        )

    def _problem(self, x: Table) -> estimate.Problem:
        mean_P, sd_P = self.priors(x)
        if self.config.prior == "none":
            sd_P = np.full_like(sd_P, np.inf)
        # The gap is known to within a factor of seven, the scales to within a factor of four (95%).
        rest = np.log([self.config.gap, self.config.noise, self.config.noise])
        prior = estimate.Prior(np.concatenate([mean_P, rest]), np.concatenate([sd_P, [1.0, 0.7, 0.7]]))
        return estimate.Problem(self.log_loss, self.gradient, x, prior, self.config.delta, self.config.per_run)

    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        """Loss of a new, finished run at each of `points`: a prediction interval.

        It holds the draws' spread, the spread of single runs about the law (and of one measurement about its
        run's mean, where runs have several rows), and `drift` for each decade
        outside the fitted range.
        """
        if not 0 < level < 1:
            raise UserError(f"level={level} is not between 0 and 1; write for example 0.95")
        table = as_table(points, self.reads, loss=False)
        x = {name: table[name] / fit.reference[name] for name in self.reads}
        log_loss_KN = self.log_loss(fit.draws_KP, x)
        rng = np.random.default_rng(fit.seed + 1)
        repeats = max(1, 4000 // len(fit.draws_KP))
        log_loss_KN = np.repeat(log_loss_KN, repeats, axis=0)
        scale_K = np.repeat(fit.noise_K, repeats)
        error_K = estimate.draw_noise(scale_K, self.config.delta, rng)
        if fit.within_K.any():
            error_K = error_K + estimate.draw_noise(np.repeat(fit.within_K, repeats), self.config.delta, rng)
        drift_KN = rng.normal(size=len(scale_K))[:, None] * self.config.drift * decades_outside(table, fit.range)
        low_N, high_N = fit.interval(np.exp(log_loss_KN + error_K[:, None] + drift_KN), level)
        return Prediction(np.exp(log_loss_KN).mean(0), low_N, high_N, level)

    def optimum(self, fit: Fit, flops: float, level: float = 0.95) -> Optimum:
        """The split of `flops` = 6 N D into parameters N and tokens D that reaches the lowest loss."""
        if set(self.reads) != {"parameters", "tokens"}:
            raise UserError(
                f"the law {fit.law!r} reads {', '.join(self.reads)} only, so it cannot split a budget "
                "between parameters and tokens; fit --law chinchilla"
            )
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


def decades_outside(table: Table, ranges: dict[str, tuple[float, float]]) -> np.ndarray:
    """Decades between each point (N) and the fitted range, added over the columns."""
    outside = [
        np.maximum(np.log10(table[n] / high), 0) + np.maximum(np.log10(low / table[n]), 0)
        for n, (low, high) in ranges.items()
    ]
    return np.sum(outside, axis=0)


def _thin(table: Table) -> Table:
    """At most MAX_ROWS_PER_RUN rows of each run, spread evenly over its log tokens, the last one kept."""
    keep = np.zeros(len(table["loss"]), bool)
    size = np.log(next(table[n] for n in ("tokens", "flops", "parameters") if n in table))
    for run in range(int(table["run"].max()) + 1):
        rows = np.flatnonzero(table["run"] == run)
        if len(rows) > MAX_ROWS_PER_RUN:
            rows = rows[np.argsort(size[rows], kind="stable")]
            wanted = np.linspace(size[rows[0]], size[rows[-1]], MAX_ROWS_PER_RUN)
            rows = rows[np.unique(np.searchsorted(size[rows], wanted).clip(0, len(rows) - 1))]
        keep[rows] = True
    return {name: column[keep] for name, column in table.items()}
