"""Mixtures that methods of the port draw, and a predictor of the loss that a mixture gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modicum.laws.experiments import Conclusion, Run, Setting

LEAST = 1e-3  # fraction under a logarithm


def drawn(rng: np.random.Generator, setting: Setting, count: int, concentration: float) -> np.ndarray:
    """Fractions [count, domains] from a Dirichlet distribution whose mean is the domains' fractions of the tokens.

    concentration: its parameters' mean; below 1 most weight lies on few domains.
    """
    alpha = np.maximum(concentration * len(setting.domains) * setting.natural(), 0.02)
    fractions: np.ndarray = rng.dirichlet(alpha, count)
    return fractions


def affordable(fractions_ND: np.ndarray, setting: Setting, epochs: float) -> np.ndarray:
    """bool [N]: mixtures of which a trial of length 1 repeats no domain more than `epochs` times."""
    sizes = np.array([*setting.domains.values()], dtype=float)
    kept: np.ndarray = np.all(fractions_ND * setting.tokens <= epochs * sizes + 1e-9, axis=1)
    return kept


def features(fractions_ND: np.ndarray) -> np.ndarray:
    """Fractions, their squares and logarithms, N x 3D."""
    return np.concatenate([fractions_ND, fractions_ND**2, np.log(fractions_ND + LEAST)], axis=1)


class Predictor:
    """Ridge regression of the loss on a mixture's features, standardised; the strength with the least error when each
    run is left out in turn. `error`: the root mean square of those errors. `errors` of other mixtures grow as they lie
    away from those that were measured."""

    def __init__(self, fractions_ND: np.ndarray, losses_N: np.ndarray):
        x = features(fractions_ND)
        self.mean, self.spread = x.mean(0), np.maximum(x.std(0), 1e-9)
        z = (x - self.mean) / self.spread
        self.middle = float(losses_N.mean())
        y = losses_N - self.middle
        best = (np.inf, np.zeros(z.shape[1]), np.zeros((z.shape[1], z.shape[1])))
        for strength in np.geomspace(1e-3, 10, 13):
            inverse = np.linalg.inv(z.T @ z + strength * len(y) * np.eye(z.shape[1]))
            leverage = np.einsum("nr,rs,ns->n", z, inverse, z) + 1 / len(y)
            weight = inverse @ (z.T @ y)
            error = float(np.sqrt((((y - z @ weight) / np.maximum(1 - leverage, 0.05)) ** 2).mean()))
            if error < best[0]:
                best = error, weight, inverse
        self.error, self.weight, self.inverse = best

    def __call__(self, fractions_ND: np.ndarray) -> np.ndarray:
        predicted: np.ndarray = self.middle + (features(fractions_ND) - self.mean) / self.spread @ self.weight
        return predicted

    def errors(self, fractions_ND: np.ndarray) -> np.ndarray:
        """float64 [N]: the error of each prediction: error sqrt(1 + x (X^T X + ridge)^-1 x), over that of the runs."""
        z = (features(fractions_ND) - self.mean) / self.spread
        wide: np.ndarray = self.error * np.sqrt(1 + np.einsum("nr,rs,ns->n", z, self.inverse, z))
        return wide


def fractions_of(run: Run, setting: Setting) -> np.ndarray:
    weights = run.trial.weights
    given = setting.natural() if weights is None else np.array([weights.get(d, 0.0) for d in setting.domains])
    fractions: np.ndarray = given / given.sum()
    return fractions


def measured(runs: Sequence[Run], setting: Setting) -> list[dict[str, object]]:
    """A row for each run: its mixture and its score."""
    return [
        {"trial": run.trial.name, "loss": setting.score(run), **setting.weights(fractions_of(run, setting))}
        for run in runs
    ]


def best_measured(runs: Sequence[Run], setting: Setting) -> Conclusion:
    best = min(runs, key=setting.score)
    return Conclusion(
        rows=measured(runs, setting),
        weights=setting.weights(fractions_of(best, setting)),
        predicted=setting.score(best),
        notes=("the least of several measured losses is lower by chance than the same mixture will give again",),
    )
