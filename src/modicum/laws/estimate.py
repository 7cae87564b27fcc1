"""Fitting a law: robust maximum a posteriori, then draws by posterior sampling or bootstrap.

The residual of row i is r_i = log L_i - log f(x_i) for a loss, y_i - f(x_i) for a score or a change. Hoffmann et al.
2022 (arXiv:2203.15556, section 3.3) minimise sum_i Huber_delta(r_i), delta = 1e-3. That is the maximum of the
likelihood whose density is

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
from scipy.special import erf

from modicum.laws.table import Table

Curve = Callable[[np.ndarray, Table], np.ndarray]  # (theta_KP, rows) -> log loss, score or change, KN
Gradient = Callable[[np.ndarray, Table], np.ndarray]  # (theta_KP, rows) -> d curve / d theta_KNP
WALL = 0.1  # width of the fall above a coordinate's upper limit


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """Huber_delta(r) / delta: |r| - delta/2 beyond delta, r^2 / (2 delta) within."""
    size = np.abs(r)
    return np.where(size <= delta, r * r / (2 * delta), size - delta / 2)


def log_norm(log_scale: np.ndarray, delta: float) -> np.ndarray:
    """log Z(s): the integral of exp(-huber(r) / s) over all r."""
    s = np.exp(np.maximum(log_scale, np.log(delta) - 12))
    return np.log(np.sqrt(2 * np.pi * s * delta) * erf(np.sqrt(delta / (2 * s))) + 2 * s * np.exp(-delta / (2 * s)))


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
    """Normal priors on the fitted coordinates; an infinite sd is no prior.

    upper_F: above it the density falls steeply, below it is untouched. Without a prior nothing else stops the exponent
    of a term that the data do not need: it grows until the term's prefactor overflows.
    """

    mean_F: np.ndarray
    sd_F: np.ndarray
    upper_F: np.ndarray | float = np.inf

    def value(self, phi_KF: np.ndarray) -> np.ndarray:
        """Negative log density (K), without its constant."""
        above_KF = np.maximum(phi_KF - self.upper_F, 0) / WALL
        value_K: np.ndarray = 0.5 * (((phi_KF - self.mean_F) / self.sd_F) ** 2 + above_KF**2).sum(1)
        return value_K

    def gradient(self, phi_KF: np.ndarray) -> np.ndarray:
        return (phi_KF - self.mean_F) / self.sd_F**2 + np.maximum(phi_KF - self.upper_F, 0) / WALL**2


@dataclass
class Problem:
    """Negative log posterior of (theta_P, log gap, log between, log within) given the rows.

    Every function takes K sets of coordinates at once. `counts_KR`: how often each run is counted, for
    each of them (a bootstrap's resamples); None counts each run once.
    """

    curve: Curve
    gradient: Gradient
    rows: Table
    prior: Prior
    delta: float
    per_run: int

    def __post_init__(self) -> None:
        order = np.argsort(self.rows["run"], kind="stable")
        self.rows = {name: column[order] for name, column in self.rows.items()}
        self.n_coordinates = len(self.prior.mean_F) - 3
        self.run_N = self.rows["run"]
        self.size_R = np.bincount(self.run_N)
        self.first_R = np.concatenate([[0], np.cumsum(self.size_R)[:-1]])
        self.n_runs, self.n_rows = len(self.size_R), len(self.run_N)
        self.single = bool((self.size_R == 1).all())
        self.degrees_R = np.minimum(self.size_R, self.per_run) - 1.0
        # Rows that are known less well than others (a score of few items) count by their spread.
        self.spread_N = self.rows.get("spread", np.ones(self.n_rows))

    def residuals(self, phi_KF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean residual of each run, and each row's deviation from it."""
        p = self.n_coordinates
        r_KN = self.rows["observed"] - self.curve(phi_KF[:, :p], self.rows)
        r_KN = (r_KN - np.log1p(np.exp(phi_KF[:, p : p + 1])) * self.rows["decay_left"]) / self.spread_N
        if self.single:
            return r_KN, np.zeros_like(r_KN)
        mean_KR = self._mean(r_KN)
        return mean_KR, r_KN - mean_KR[:, self.run_N]

    def _mean(self, values: np.ndarray) -> np.ndarray:
        """Means over each run's rows along axis 1."""
        shape = (-1,) + (1,) * (values.ndim - 2)
        return np.add.reduceat(values, self.first_R, axis=1) / self.size_R.reshape(shape)

    def value(self, phi_KF: np.ndarray, counts_KR: np.ndarray | None = None) -> np.ndarray:
        """(K,) negative log posterior; infinite where the law overflows."""
        with np.errstate(over="ignore", invalid="ignore"):
            value_K = self._value(phi_KF, *self.residuals(phi_KF), counts_KR)
            return np.where(np.isfinite(value_K), value_K, np.inf)

    def _value(
        self, phi_KF: np.ndarray, mean_KR: np.ndarray, deviation_KN: np.ndarray, counts_KR: np.ndarray | None
    ) -> np.ndarray:
        total_K = self.prior.value(phi_KF)
        for column, misfit_K, number in self._scales(mean_KR, deviation_KN, counts_KR):
            log_scale_K = phi_KF[:, column]
            total_K = total_K + misfit_K * np.exp(-log_scale_K) + number * log_norm(log_scale_K, self.delta)
        return total_K

    def _scales(self, mean_KR: np.ndarray, deviation_KN: np.ndarray, counts_KR: np.ndarray | None) -> list[Any]:
        """(coordinate, misfit_K, number of observations) of the two scales."""
        p = self.n_coordinates
        counts = np.ones((1, self.n_runs)) if counts_KR is None else counts_KR
        scales = [(p + 1, (huber(mean_KR, self.delta) * counts).sum(1), counts.sum(1))]
        if not self.single:
            within_KR = self._mean(huber(deviation_KN, self.delta)) * self.degrees_R
            scales.append((p + 2, (within_KR * counts).sum(1), (self.degrees_R * counts).sum(1)))
        return scales

    def value_and_gradient(
        self, phi_KF: np.ndarray, counts_KR: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(K,) and KF."""
        p, delta = self.n_coordinates, self.delta
        with np.errstate(over="ignore", invalid="ignore"):
            mean_KR, deviation_KN = self.residuals(phi_KF)
            value_K = self._value(phi_KF, mean_KR, deviation_KN, counts_KR)
            counts = np.ones((1, self.n_runs)) if counts_KR is None else counts_KR
            # d value / d residual: of a run's mean, and of a row's deviation from it
            back_KR = counts * np.clip(mean_KR / delta, -1, 1) * np.exp(-phi_KF[:, p + 1 : p + 2])
            if self.single:
                back_KN = back_KR
            else:
                pull_KN = np.clip(deviation_KN / delta, -1, 1) * np.exp(-phi_KF[:, p + 2 : p + 3])
                pull_KN = pull_KN - self._mean(pull_KN)[:, self.run_N]
                back_KN = (back_KR / self.size_R)[:, self.run_N] + pull_KN * (counts * self.degrees_R / self.size_R)[
                    :, self.run_N
                ]
            gradient_KF = self.prior.gradient(phi_KF)
            gradient_KF[:, : p + 1] -= np.einsum("kn,knf->kf", back_KN, self._jacobian(phi_KF))
            step = 1e-5
            for column, misfit_K, number in self._scales(mean_KR, deviation_KN, counts_KR):
                log_scale_K = phi_KF[:, column]
                slope_K = log_norm(log_scale_K + step, delta) - log_norm(log_scale_K - step, delta)
                gradient_KF[:, column] += number * slope_K / (2 * step) - misfit_K * np.exp(-log_scale_K)
        good_K = np.isfinite(value_K) & np.isfinite(gradient_KF).all(1)
        return np.where(good_K, value_K, np.inf), np.where(good_K[:, None], gradient_KF, 0.0)

    def _jacobian(self, phi_KF: np.ndarray) -> np.ndarray:
        """d (curve + log(1 + gap) decay_left) / spread / d (theta, log gap), shape KN(P+1)."""
        p = self.n_coordinates
        gap_K = np.exp(phi_KF[:, p])
        gap_KN = (gap_K / (1 + gap_K))[:, None] * self.rows["decay_left"]
        slope_KNF = np.concatenate([self.gradient(phi_KF[:, :p], self.rows), gap_KN[..., None]], axis=2)
        return slope_KNF / self.spread_N[:, None]

    def information(self, phi_KF: np.ndarray) -> np.ndarray:
        """Expected information plus prior precision, KFF: where searches and samplers start from."""
        p = self.n_coordinates
        jacobian_KNF = self._jacobian(phi_KF)
        mean_KRF = self._mean(jacobian_KNF)
        scale_K2 = np.exp(phi_KF[:, p + 1 :]) + self.delta
        total = np.zeros((*phi_KF.shape, phi_KF.shape[1]))
        total[:, : p + 1, : p + 1] = np.einsum("krf,krg,k->kfg", mean_KRF, mean_KRF, scale_K2[:, 0] ** -2.0)
        if not self.single:
            own_KNF = jacobian_KNF - mean_KRF[:, self.run_N]
            weight_N = (self.degrees_R / self.size_R)[self.run_N]
            total[:, : p + 1, : p + 1] += np.einsum(
                "knf,kng,n,k->kfg", own_KNF, own_KNF, weight_N, scale_K2[:, 1] ** -2.0
            )
        total[:, p + 1, p + 1] += self.n_runs
        total[:, p + 2, p + 2] += self.degrees_R.sum()
        return total + np.diag(1 / self.prior.sd_F**2)


def minimise(
    problem: Problem, starts_KF: np.ndarray, counts_KR: np.ndarray | None = None, iterations: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """The K minima (KF) reached from K starts, and their values.

    BFGS on all of them at once, with the weak Wolfe line search of Lewis & Overton 2013 (Math. Program.
    141:135) that also serves objectives with near-kinks, as Huber's with a small delta. The inverse Hessian
    starts from the expected information. (A library's L-BFGS takes one at a time, and on matrices this small
    its threads cost more than the work.)
    """
    phi = starts_KF.astype(float).copy()
    value, slope = problem.value_and_gradient(phi, counts_KR)
    # Coordinates are logarithms: where the data say nothing, a first step of a factor of e^10 is enough.
    inverse = np.linalg.inv(problem.information(phi) + 1e-2 * np.eye(phi.shape[1]))
    still = np.zeros(len(phi), dtype=int)  # iterations without progress
    for _ in range(iterations):
        live = np.flatnonzero(still < 3)
        if not len(live):
            break
        counts = None if counts_KR is None else counts_KR[live]
        here, f0, g0, h = phi[live], value[live], slope[live], inverse[live]
        direction = -np.einsum("kfg,kg->kf", h, g0)
        down = (direction * g0).sum(1)
        flat = ~(down < 0)
        direction[flat], down[flat] = -g0[flat], -(g0[flat] ** 2).sum(1)
        step, low, high = np.ones(len(live)), np.zeros(len(live)), np.full(len(live), np.inf)
        there, f1, g1 = here, f0, g0
        for _ in range(30):
            there = here + step[:, None] * direction
            f1, g1 = problem.value_and_gradient(there, counts)
            too_far = ~(f1 <= f0 + 1e-4 * step * down)
            too_near = ~too_far & ((g1 * direction).sum(1) < 0.9 * down)
            if not (too_far | too_near).any():
                break
            high, low = np.where(too_far, step, high), np.where(too_near, step, low)
            doubled = np.where(np.isinf(high), 2 * low, (low + high) / 2)
            step = np.where(too_far | too_near, doubled, step)
        moved = f1 < f0
        s, y = there - here, g1 - g0
        curve = (s * y).sum(1)
        turn = moved & (curve > 1e-12 * np.sqrt((s**2).sum(1) * (y**2).sum(1)))
        rho = np.where(turn, 1 / np.where(turn, curve, 1), 0)
        left = np.eye(phi.shape[1]) - rho[:, None, None] * s[:, :, None] * y[:, None, :]
        updated = np.einsum("kab,kbc,kdc->kad", left, h, left) + rho[:, None, None] * s[:, :, None] * s[:, None, :]
        inverse[live] = np.where(turn[:, None, None], updated, h)
        phi[live] = np.where(moved[:, None], there, here)
        value[live], slope[live] = np.where(moved, f1, f0), np.where(moved[:, None], g1, g0)
        gain = np.where(moved, f0 - f1, 0)
        still[live] = np.where(gain > 1e-11 * np.maximum(1, np.abs(f0)), 0, still[live] + 1)
    return phi, value


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
    information = problem.information(best_F[None])[0]
    free = np.diag(information) > 1e-12
    information = information[np.ix_(free, free)]
    values, vectors = np.linalg.eigh(information)
    scatter = vectors / np.sqrt(np.maximum(values, 0.1))  # where nothing is known: within a factor of e^3, not of e^1e6
    n_free = int(free.sum())
    phi_KF = np.tile(best_F, (walkers, 1))
    phi_KF[:, free] += rng.normal(size=(walkers, n_free)) @ scatter.T
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
                accept_H = np.log(rng.random(len(here_HF))) < (n_free - 1) * np.log(z_H) + proposed_H - density_K[mine]
            phi_KF[mine] = np.where(accept_H[:, None], moved_HF, here_HF)
            density_K[mine] = np.where(accept_H, proposed_H, density_K[mine])
        if step >= steps // 2 and (step - steps // 2) % every == every - 1:
            kept.append(phi_KF.copy())
    draws_KF = np.concatenate(kept)
    return draws_KF[rng.permutation(len(draws_KF))[:n_draws]]


def bootstrap(problem: Problem, best_F: np.ndarray, rng: np.random.Generator, *, n_draws: int) -> np.ndarray:
    """Draws KF: runs resampled with replacement, the law refitted from the best fit each time."""
    runs = problem.n_runs
    counts_KR = np.stack([np.bincount(rng.integers(runs, size=runs), minlength=runs) for _ in range(n_draws)])
    size = max(1, 500_000 // (problem.n_rows * len(best_F)))  # bounds the memory of the Jacobians
    parts = [counts_KR[i : i + size].astype(float) for i in range(0, n_draws, size)]
    return np.concatenate([minimise(problem, np.tile(best_F, (len(c), 1)), c)[0] for c in parts])
