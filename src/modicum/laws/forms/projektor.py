"""projektor: how good a mixture of sources will be at a larger size, from its distance to the target and small runs.

    at two sizes N0 < N1:  V(N, p) = sum_i (b2_i p_i^2 + b1_i p_i + b0) OT(p) + sum_i (c1_i p_i + c0)
    beyond:                V(N, p) = [ log(N / N0) V(N1, p) - log(N / N1) V(N0, p) ] / log(N1 / N0)

p are the shares of the sources (they sum to 1, so the last one is left out), OT(p) the optimal-transport distance of
the mixture to held-out text of the target (`data.transport`), a column `transport` of the rows. The second step has no
parameters: it goes straight on in the logarithm of the size. `select` follows the gradient to the best shares, down
where V is a loss.

Kang et al. 2023, arXiv:2307.02460 (NeurIPS 2023), and the authors' notebook for the regressors (no quadratic term
without OT). Departs: text has no labels, so the distance is that of embeddings alone; ridge 1e-3 on standardised
regressors instead of plain least squares; intervals from leave-one-out residuals, widened as the extrapolation weighs
them; sizes beyond 8 N1 are refused, since a straight line has no floor (`far=true` allows them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.data.transport import project_simplex
from modicum.laws.fit import Fit, Prediction
from modicum.laws.forms import Law
from modicum.laws.table import Runs, as_table, to_columns

CLAIM = {"figure": "better selection than scaling-law baselines", "where": "abstract", "scale": "CIFAR-10, 3 sources"}
FARTHEST = 8.0  # times the larger of the two sizes


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of the projection."""

    of: str = "loss"  # what V is: loss (lower is better) or score
    ridge: float = 1e-3
    far: bool = False  # extrapolate beyond 8 times the larger size

    def __post_init__(self) -> None:
        if self.of not in ("loss", "score") or self.ridge < 0:
            raise ValueError("of must be loss or score, ridge not below 0")


class Projektor(Law):
    config: Config
    columns = ("tokens", "transport")

    @property
    def target(self) -> str:  # type: ignore[override]
        return self.config.of

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        given = to_columns(runs)
        names = sorted(n for n in given if n.startswith("ratio_"))
        if len(names) < 2:
            raise UserError(
                "a mixture has a column ratio_NAME for each of at least two sources, summing to 1 in each row"
            )
        table = as_table(given, (*self.columns, *names), target=self.target)
        fractions_NM = np.stack([table[n] for n in names], axis=1)
        if np.abs(fractions_NM.sum(1) - 1).max() > 1e-3:
            raise UserError("the ratio_ columns of every row must sum to 1; one of them does not")
        sizes = np.unique(table["tokens"])
        if len(sizes) < 2:
            raise UserError("runs of two sizes are needed to go on from; the table holds one")
        parts, left = [], []
        for size in sizes[-2:]:
            at = table["tokens"] == size
            x_NR = regressors(fractions_NM[at], table["transport"][at])
            if at.sum() < 4:
                raise UserError(f"{int(at.sum())} mixtures at {size:.3g} tokens do not determine V; give at least 4")
            part, residual_N = ridge(x_NR, table[self.target][at], self.config.ridge)
            parts.append(part)
            left.append(float(np.sqrt((residual_N**2).mean())))
        return Fit(
            law="projektor",
            target=self.target,
            parameters={"N0": float(sizes[-2]), "N1": float(sizes[-1]), "error_N0": left[0], "error_N1": left[1]},
            points=len(table["tokens"]),
            runs=len(table["tokens"]),
            seed=seed,
            method="residuals",
            range={"tokens": (float(sizes[-2]), float(sizes[-1]))},
            residual=left[1],
            knobs=dataclasses.asdict(self.config),
            extra={"sources": names, "parts": [[v.tolist() for v in part] for part in parts]},
        )

    def _weights(self, fit: Fit, tokens_N: np.ndarray) -> np.ndarray:
        """How much V(N0) and V(N1) count at each size, 2N."""
        low, high = fit.parameters["N0"], fit.parameters["N1"]
        if (tokens_N > FARTHEST * high).any() and not self.config.far:
            raise UserError(
                f"{tokens_N.max():.3g} tokens are more than {FARTHEST:.0f} times the larger fitted size ({high:.3g}), "
                "where a straight line means little; fit larger runs, or set far=true"
            )
        wide = np.log(high / low)
        return np.stack([-np.log(tokens_N / high) / wide, np.log(tokens_N / low) / wide])

    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        from scipy.stats import t

        table = as_table(points, (*self.columns, *fit.extra["sources"]), target=None)
        fractions_NM = np.stack([table[n] for n in fit.extra["sources"]], axis=1)
        x_NR = regressors(fractions_NM, table["transport"])
        weight_2N = self._weights(fit, table["tokens"])
        value_2N = np.stack([_apply(part, x_NR) for part in fit.extra["parts"]])
        mean_N = (weight_2N * value_2N).sum(0)
        error_2 = np.array([fit.parameters["error_N0"], fit.parameters["error_N1"]])
        sd_N = np.sqrt(((weight_2N * error_2[:, None]) ** 2).sum(0)) + 1e-9
        wide_N = sd_N * t.ppf((1 + level) / 2, max(fit.points // 2 - 2, 2))
        return Prediction(mean_N, mean_N - wide_N, mean_N + wide_N, level)

    def select(
        self,
        fit: Fit,
        transport: Callable[[np.ndarray], tuple[float, np.ndarray]],
        tokens: float,
        *,
        steps: int = 100,
        rate: float = 0.05,
    ) -> np.ndarray:
        """The best shares (M, in the order of `fit.extra["sources"]`) at a size, by projected gradient.

        transport(shares) gives the distance of the mixture to the target and its gradient, as
        `data.transport.mixture_cost`.
        """
        sign = -1.0 if self.target == "loss" else 1.0
        count = len(fit.extra["sources"])
        weight_2 = self._weights(fit, np.array([tokens]))[:, 0]
        best, best_value = np.full(count, 1 / count), -np.inf
        # V is not convex: from equal shares, and from near every single source
        for p in [best, *(0.7 * np.eye(count) + 0.3 / count)]:
            for step in range(steps):
                cost, slope = transport(p)
                value, gradient = 0.0, np.zeros(count)
                for weight, part in zip(weight_2, fit.extra["parts"], strict=True):
                    value += weight * float(_apply(part, regressors(p[None], np.array([cost])))[0])
                    gradient += weight * self._slope(part, p, cost, slope)
                if sign * value > best_value:
                    best, best_value = p, sign * value
                p = project_simplex(
                    p + sign * rate / np.sqrt(1 + step) * gradient / max(np.linalg.norm(gradient), 1e-12)
                )
        return best

    @staticmethod
    def _slope(part: Any, p: np.ndarray, cost: float, slope: np.ndarray) -> np.ndarray:
        """dV/dp, where p's last entry moves V by way of the transport alone."""
        weight_R = np.array(part[1]) / np.array(part[3])
        m = len(p) - 1
        by_p, by_cost = np.zeros(len(p)), weight_R[0]
        for i in range(m):
            linear, with_cost, square = weight_R[1 + i], weight_R[1 + m + i], weight_R[1 + 2 * m + i]
            by_p[i] = linear + with_cost * cost + 2 * square * p[i] * cost
            by_cost += with_cost * p[i] + square * p[i] ** 2
        total: np.ndarray = by_p + by_cost * slope
        return total

    def simulate(self, rng: np.random.Generator, *, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        def rows(count: int, sizes: tuple[float, ...], noise: float) -> dict[str, Any]:
            p = rng.dirichlet([1.5] * 3, count * len(sizes))
            n = np.repeat(sizes, count)
            cost = 0.3 + 0.2 * p[:, 0] - 0.1 * p[:, 1] + 0.05 * p[:, 2] ** 2
            small = 3 + 0.4 * cost + 0.5 * p[:, 0] - 0.3 * p[:, 1] * cost + 0.6 * p[:, 0] ** 2 * cost
            value = small - 0.15 * np.log(n / 1e5) * (1 + 0.3 * p[:, 1])
            value = value * (1 + noise * rng.normal(size=len(n)))
            return {"tokens": n, "transport": cost, "loss": value} | {
                f"ratio_{s}": p[:, i] for i, s in enumerate("abc")
            }

        return rows(16, (1e5, 2e5), noise), rows(6, (8e5,), 0.0)


def regressors(fractions_NM: np.ndarray, transport_N: np.ndarray) -> np.ndarray:
    """OT, p_i, p_i OT, p_i^2 OT over all sources but the last, N x (1 + 3 (M - 1))."""
    p, cost = fractions_NM[:, :-1], transport_N[:, None]
    return np.concatenate([cost, p, p * cost, p**2 * cost], axis=1)


def ridge(x_NR: np.ndarray, y_N: np.ndarray, strength: float) -> tuple[list[np.ndarray], np.ndarray]:
    """[mean of y, weights, means, spreads] of a ridge regression on standardised columns; leave-one-out residuals."""
    middle, spread = x_NR.mean(0), np.maximum(x_NR.std(0), 1e-12)
    z_NR = (x_NR - middle) / spread
    gram = z_NR.T @ z_NR + strength * len(y_N) * np.eye(z_NR.shape[1]) + 1e-9 * np.eye(z_NR.shape[1])
    weight_R = np.linalg.solve(gram, z_NR.T @ (y_N - y_N.mean()))
    hat_N = np.einsum("nr,rs,ns->n", z_NR, np.linalg.inv(gram), z_NR) + 1 / len(y_N)
    residual_N = (y_N - y_N.mean() - z_NR @ weight_R) / np.maximum(1 - hat_N, 0.05)
    return [np.array(y_N.mean()), weight_R, middle, spread], residual_N


def _apply(part: Any, x_NR: np.ndarray) -> np.ndarray:
    mean, weight_R, middle, spread = (np.array(v) for v in part)
    value_N: np.ndarray = mean + (x_NR - middle) / spread @ weight_R
    return value_N
