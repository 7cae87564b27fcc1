"""Fitting a law: robust maximum a posteriori, then draws by posterior sampling or bootstrap.

The log residual of row i is r_i = log L_i - log f(x_i). Hoffmann et al. 2022 (arXiv:2203.15556,
section 3.3) minimise sum_i Huber_delta(r_i), delta = 1e-3. That is the maximum of the likelihood whose
density is

    p(r | s) = exp(-Huber_delta(r) / (delta s)) / Z(s),      close to Laplace(s) when s >> delta,

for whatever scale s, so the scale can be estimated and priors added without another objective. Rows of
one run (checkpoints along it) are not independent: the run's mean residual has a scale of its own,
`between`; its rows vary about that mean with scale `within`, counted as at most `per_run` rows.

Draws: with many runs, runs are resampled and the law refitted (bootstrap); with few, the posterior is
sampled by the affine-invariant ensemble of Goodman & Weare 2010 (Comm. App. Math. Comp. Sci. 5:65),
because a resample of three runs does not determine five parameters. Besiroglu et al. 2024
(arXiv:2404.10102) found that the original fit had stopped early on a badly scaled (averaged) loss and
that its intervals were too narrow: here the loss is summed, tolerances are tight, and several starts compete.

Letters: K draws or walkers, P coordinates of the law, F fitted coordinates (the law's, then gap,
log between, log within), N rows, R runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import erf

from modicum.laws.table import Table

LogLaw = Callable[[np.ndarray, Table], np.ndarray]  # (theta_KP, rows) -> log loss_KN
Gradient = Callable[[np.ndarray, Table], np.ndarray]  # (theta_P, rows) -> d log loss / d theta_NP


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """Huber_delta(r) / delta: |r| - delta/2 beyond delta, r^2 / (2 delta) within."""
    size = np.abs(r)
    return np.where(size <= delta, r * r / (2 * delta), size - delta / 2)


def log_norm(log_scale: np.ndarray, delta: float) -> np.ndarray:
    """log Z(s): the integral of exp(-huber(r) / s) over all r."""
    s = np.exp(log_scale)
    return np.log(
        np.sqrt(2 * np.pi * s * delta) * erf(np.sqrt(delta / (2 * s))) + 2 * s * np.exp(-delta / (2 * s))
    )


def draw_noise(scale_K: np.ndarray, delta: float, rng: np.random.Generator) -> np.ndarray:
    """One residual per scale from p(r | s), exactly: a clipped normal inside, exponential tails outside."""
    tails = 2 * scale_K * np.exp(-delta / (2 * scale_K))
    inside = rng.random(scale_K.shape) >= tails / np.exp(log_norm(np.log(scale_K), delta))
    width = np.sqrt(scale_K * delta)
    normal = rng.normal(size=scale_K.shape) * width
    while (out := inside & (np.abs(normal) > delta)).any():
        # scales far above delta make the normal nearly flat inside: a uniform proposal is then accepted often
        proposal = rng.uniform(-delta, delta, size=scale_K.shape)
        accept = rng.random(scale_K.shape) < np.exp(-(proposal**2) / (2 * width**2))
        normal = np.where(out & accept, proposal, normal)
    tail = (delta + rng.exponential(scale_K)) * rng.choice([-1.0, 1.0], size=scale_K.shape)
    return np.where(inside, normal, tail)


@dataclass(frozen=True)
class Prior:
    """Normal priors on the fitted coordinates; an infinite sd is no prior."""

    mean_F: np.ndarray
    sd_F: np.ndarray

    def precision_F(self) -> np.ndarray:
        return 1 / self.sd_F**2


@dataclass
class Problem:
    """Negative log posterior of (theta_P, gap, log between, log within) given the rows."""

    log_law: LogLaw
    gradient: Gradient
    rows: Table
    prior: Prior
    delta: float
    per_run: int

    def __post_init__(self) -> None:
        self.n_coordinates = len(self.prior.mean_F) - 3
        run = self.rows["run"]
        count_R = np.bincount(run)
        self.n_runs, self.n_rows = len(count_R), len(run)
        self.single = bool((count_R == 1).all())
        self.average_RN = np.zeros((self.n_runs, self.n_rows))
        self.average_RN[run, np.arange(self.n_rows)] = 1 / count_R[run]
        effective_R = np.minimum(count_R, self.per_run)
        self.weight_N = ((effective_R - 1) / count_R)[run]
        self.degrees = float((effective_R - 1).sum())
        self.log_loss_N = np.log(self.rows["loss"])
        self.early_N = (~self.rows["final"]).astype(float)

    def residuals(self, phi_KF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean residual of each run, and each row's deviation from it."""
        p = self.n_coordinates
        r_KN = (
            self.log_loss_N
            - self.log_law(phi_KF[:, :p], self.rows)
            - np.log1p(np.maximum(phi_KF[:, p : p + 1], 0)) * self.early_N
        )
        if self.single:
            return r_KN, np.zeros_like(r_KN)
        mean_KR = r_KN @ self.average_RN.T
        return mean_KR, r_KN - mean_KR[:, self.rows["run"]]

    def value(self, phi_KF: np.ndarray) -> np.ndarray:
        """(K,) negative log posterior; infinite where the gap is negative or the law overflows."""
        with np.errstate(over="ignore", invalid="ignore"):
            value_K = self._value(phi_KF, *self.residuals(phi_KF))
            return np.where((phi_KF[:, self.n_coordinates] >= 0) & np.isfinite(value_K), value_K, np.inf)

    def _value(self, phi_KF: np.ndarray, mean_KR: np.ndarray, deviation_KN: np.ndarray) -> np.ndarray:
        p, delta = self.n_coordinates, self.delta
        between_K, within_K = phi_KF[:, p + 1], phi_KF[:, p + 2]
        value_K = huber(mean_KR, delta).sum(1) * np.exp(-between_K) + self.n_runs * log_norm(between_K, delta)
        if self.degrees:
            misfit_K = (huber(deviation_KN, delta) * self.weight_N).sum(1)
            value_K = value_K + misfit_K * np.exp(-within_K) + self.degrees * log_norm(within_K, delta)
        return value_K + 0.5 * (((phi_KF - self.prior.mean_F) / self.prior.sd_F) ** 2).sum(1)

    def value_and_gradient(self, phi_F: np.ndarray) -> tuple[float, np.ndarray]:
        p, delta = self.n_coordinates, self.delta
        jacobian_NF = self._jacobian(phi_F)
        mean_KR, deviation_KN = self.residuals(phi_F[None])
        mean_R, deviation_N = mean_KR[0], deviation_KN[0]
        slope_R = np.clip(mean_R / delta, -1, 1) * np.exp(-phi_F[p + 1])
        value = float(self._value(phi_F[None], mean_KR, deviation_KN)[0])
        if self.single:
            gradient_F = -slope_R @ jacobian_NF
        else:
            slope_N = np.clip(deviation_N / delta, -1, 1) * self.weight_N * np.exp(-phi_F[p + 2])
            back_N = (
                slope_R @ self.average_RN
                + slope_N
                - (slope_N @ self.average_RN.T * np.bincount(self.rows["run"])) @ self.average_RN
            )
            gradient_F = -back_N @ jacobian_NF
        gradient_F = gradient_F + (phi_F - self.prior.mean_F) * self.prior.precision_F()
        for index, total, number in (
            (p + 1, huber(mean_R, delta).sum(), self.n_runs),
            (p + 2, (huber(deviation_N, delta) * self.weight_N).sum(), self.degrees),
        ):
            if number:
                step = 1e-6
                slope = (log_norm(phi_F[index] + step, delta) - log_norm(phi_F[index] - step, delta)) / (
                    2 * step
                )
                gradient_F[index] += -total * np.exp(-phi_F[index]) + number * slope
        return value, gradient_F

    def _jacobian(self, phi_F: np.ndarray) -> np.ndarray:
        """d (log law + log(1 + gap) early) / d phi, shape NF."""
        p = self.n_coordinates
        jacobian_NF = np.zeros((self.n_rows, len(phi_F)))
        jacobian_NF[:, :p] = self.gradient(phi_F[:p], self.rows)
        jacobian_NF[:, p] = self.early_N / (1 + max(phi_F[p], 0))
        return jacobian_NF

    def information(self, phi_F: np.ndarray) -> np.ndarray:
        """Expected information plus prior precision, FF: the curvature used to scatter the first walkers."""
        p, jacobian_NF = self.n_coordinates, self._jacobian(phi_F)
        mean_RF = self.average_RN @ jacobian_NF
        between, within = np.exp(phi_F[p + 1]) + self.delta, np.exp(phi_F[p + 2]) + self.delta
        total = mean_RF.T @ mean_RF / between**2
        if not self.single:
            deviation_NF = jacobian_NF - mean_RF[self.rows["run"]]
            total = total + (deviation_NF * self.weight_N[:, None]).T @ deviation_NF / within**2
        total[p + 1, p + 1] += self.n_runs
        total[p + 2, p + 2] += self.degrees
        return total + np.diag(self.prior.precision_F())


def minimise(problem: Problem, starts_SF: np.ndarray, bounds: Any) -> np.ndarray:
    """The best of L-BFGS runs: a short one from every start, the two best to convergence.

    Tolerances are tight, and the sum rather than the mean is minimised.
    """

    def descend(start_F: np.ndarray, iterations: int) -> tuple[float, np.ndarray]:
        options = {"maxiter": iterations, "maxfun": 10 * iterations, "ftol": 1e-14, "gtol": 1e-9, "maxls": 50}
        found = minimize(
            problem.value_and_gradient, start_F, jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        return float(found.fun), found.x

    short = [descend(start_F, 40) for start_F in starts_SF] if len(starts_SF) > 1 else [(0.0, starts_SF[0])]
    short.sort(key=lambda item: item[0])
    return min((descend(start_F, 3000) for _, start_F in short[:2]), key=lambda item: item[0])[1]


def sample_posterior(
    problem: Problem,
    best_F: np.ndarray,
    rng: np.random.Generator,
    *,
    n_draws: int,
    walkers: int = 128,
    steps: int = 400,
) -> np.ndarray:
    """Draws KF by the stretch move: halves of the ensemble propose along lines to the other half."""
    free = np.isfinite(problem.prior.sd_F) | (np.abs(np.diag(problem.information(best_F))) > 1e-12)
    information = problem.information(best_F)[np.ix_(free, free)]
    values, vectors = np.linalg.eigh(information)
    scatter = vectors / np.sqrt(np.maximum(values, 1e-12))
    n_free = int(free.sum())
    phi_KF = np.tile(best_F, (walkers, 1))
    phi_KF[:, free] += rng.normal(size=(walkers, n_free)) @ scatter.T
    gap = problem.n_coordinates
    phi_KF[:, gap] = np.abs(phi_KF[:, gap])
    density_K = -problem.value(phi_KF)
    half, kept = walkers // 2, []
    thin = max((steps // 2) * walkers // max(n_draws, 1), 1)
    every = max(thin // walkers, 1)
    for step in range(steps):
        for mine, other in ((slice(0, half), slice(half, walkers)), (slice(half, walkers), slice(0, half))):
            here_HF, there_HF = phi_KF[mine], phi_KF[other]
            partner_HF = there_HF[rng.integers(len(there_HF), size=len(here_HF))]
            z_H = (rng.random(len(here_HF)) + 1) ** 2 / 2  # density 1/sqrt(z) on [1/2, 2]
            moved_HF = partner_HF + z_H[:, None] * (here_HF - partner_HF)
            proposed_H = -problem.value(moved_HF)
            with np.errstate(invalid="ignore"):
                accept_H = (
                    np.log(rng.random(len(here_HF)))
                    < (n_free - 1) * np.log(z_H) + proposed_H - density_K[mine]
                )
            phi_KF[mine] = np.where(accept_H[:, None], moved_HF, here_HF)
            density_K[mine] = np.where(accept_H, proposed_H, density_K[mine])
        if step >= steps // 2 and (step - steps // 2) % every == every - 1:
            kept.append(phi_KF.copy())
    draws_KF = np.concatenate(kept)
    return draws_KF[rng.permutation(len(draws_KF))[:n_draws]]


def bootstrap(
    problem: Problem, best_F: np.ndarray, rng: np.random.Generator, bounds: Any, *, n_draws: int
) -> np.ndarray:
    """Draws KF: runs resampled with replacement, the law refitted from the best fit each time."""
    members = [np.flatnonzero(problem.rows["run"] == r) for r in range(problem.n_runs)]
    draws = []
    for _ in range(n_draws):
        picked = rng.integers(problem.n_runs, size=problem.n_runs)
        index_N = np.concatenate([members[r] for r in picked])
        rows = {name: column[index_N] for name, column in problem.rows.items()}
        rows["run"] = np.repeat(np.arange(len(picked)), [len(members[r]) for r in picked])
        again = Problem(
            problem.log_law, problem.gradient, rows, problem.prior, problem.delta, problem.per_run
        )
        draws.append(minimise(again, best_F[None], bounds))
    return np.array(draws)
