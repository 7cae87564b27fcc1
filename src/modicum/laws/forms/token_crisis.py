"""token-crisis: how much is lost when the data are repeated, or the model is too large for them.

    U  = min(D, unique tokens)                 R_D = D / U - 1         D' = U + U R_D* (1 - exp(-R_D / R_D*))
    U_N = min(N, N_opt(U))                     R_N = N / U_N - 1       N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*))
    L = E + A / N'^alpha + B / D'^beta

A token's second, third, ... showing is worth less each time, with R_D* the number of repetitions after which it is
worth 1/e; parameters beyond what is compute-optimal for U unique tokens (N_opt(U) = (alpha A U^beta / (beta
B))^(1/alpha)) likewise. The study of the token crisis itself is empirical and gives no equation: repetition degrades,
large models most, dropout helps. The form is the data-constrained law of Muennighoff et al. It cannot express a loss
that *rises*; `excess` reports that.

Xue et al. 2023, arXiv:2305.13230 (NeurIPS 2023); form: Muennighoff et al. 2023, arXiv:2305.16264, section 3 (their
fits: R_D* 15.4, R_N* 5.3, the medians of the priors here, within a factor of four). Rows without `unique_tokens` are
single passes; on a table of those the law is `chinchilla`. The dropout that the study recommends is not part of the
law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.curve import CurveLaw
from modicum.laws.forms import Table
from modicum.laws.forms.chinchilla import Chinchilla
from modicum.laws.forms.chinchilla import Config as PlainConfig
from modicum.laws.table import Runs, as_table

CLAIM = {"figure": "repetition degrades; of usual regularisers only dropout helps", "where": "abstract", "scale": "T5"}


@dataclass(frozen=True, kw_only=True)
class Config(PlainConfig):
    repeats: float = 15.39  # prior median of R_D*
    excess_size: float = 5.31  # prior median of R_N*
    decay_spread: float = 0.7  # log standard deviation of both


TOY = Config(draws=300)


class TokenCrisis(Chinchilla):
    config: Config
    columns: ClassVar[tuple[str, ...]] = ("parameters", "tokens", "unique_tokens")
    coordinates = (*Chinchilla.coordinates, "log R_D*", "log R_N*")
    example = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37, "R_D": 12.0, "R_N": 5.0}
    small_example = {"E": 1.8, "A": 60.0, "B": 200.0, "alpha": 0.35, "beta": 0.34, "R_D": 12.0, "R_N": 5.0}

    def effective(self, theta_KP: np.ndarray, x: Table) -> tuple[np.ndarray, np.ndarray]:
        """log N' and log D', each KN, in the units of `x` and its reference."""
        unique_N = np.minimum(np.log(x["unique_tokens"]), np.log(x["tokens"]))
        log_d_KN = unique_N + np.log1p(_worth(np.log(x["tokens"]) - unique_N, theta_KP[:, 5:6]))
        alpha, beta = np.exp(theta_KP[:, 3:4]), np.exp(theta_KP[:, 4:5])
        best_KN = (np.log(alpha / beta) + theta_KP[:, 1:2] - theta_KP[:, 2:3] + beta * unique_N) / alpha
        size_N = np.log(x["parameters"])
        base_KN = np.minimum(size_N, best_KN)
        return base_KN + np.log1p(_worth(size_N - base_KN, theta_KP[:, 6:7])), log_d_KN

    def reference_of(self, table: Table) -> dict[str, float]:
        reference = super().reference_of(table)
        return reference | {"unique_tokens": reference["tokens"]}  # one unit: the form compares the two

    def _terms(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        log_n_KN, log_d_KN = self.effective(theta_KP, x)
        n_term = theta_KP[:, 1:2] - np.exp(theta_KP[:, 3:4]) * log_n_KN
        d_term = theta_KP[:, 2:3] - np.exp(theta_KP[:, 4:5]) * log_d_KN
        return np.stack([np.broadcast_to(theta_KP[:, 0:1], n_term.shape), n_term, d_term])

    def gradient(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        return CurveLaw.gradient(self, theta_KP, x)

    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        mean_P, sd_P = super().priors(x)
        c = self.config
        return np.append(mean_P, np.log([c.repeats, c.excess_size])), np.append(sd_P, [c.decay_spread] * 2)

    def starts(self, x: Table) -> np.ndarray:
        plain_S5 = super().starts(x)[:, :5]
        mean_P, _ = self.priors(x)
        return np.vstack([np.column_stack([plain_S5, np.tile(mean_P[5:], (len(plain_S5), 1))]), mean_P])

    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        own = {"R_D": np.exp(theta_KP[:, 5]), "R_N": np.exp(theta_KP[:, 6])}
        return super().to_parameters(theta_KP, reference) | own

    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        own = np.log([parameters["R_D"], parameters["R_N"]])
        return np.append(super().from_parameters(parameters, reference), own)

    def toy_points(self, n: int = 6, scale: float = 1.0) -> dict[str, np.ndarray]:
        points = super().toy_points(n, scale)
        passes = np.array([1.0, 4.0, 16.0, 40.0])[np.arange(n * n) % 4]
        return points | {"unique_tokens": points["tokens"] / passes}


def _worth(log_ratio: np.ndarray, log_decay_K1: np.ndarray) -> np.ndarray:
    """R* (1 - exp(-R / R*)) of R = exp(log_ratio) - 1, at least 0."""
    decay_K1 = np.exp(log_decay_K1)
    return -decay_K1 * np.expm1(-np.maximum(np.expm1(np.maximum(log_ratio, 0.0)), 0.0) / decay_K1)


def excess(runs: Runs) -> list[dict[str, Any]]:
    """What repetition cost each run beside the single-pass run of equal size and tokens, and when it was best.

    Rows need parameters, tokens, unique_tokens, loss and run; the passes of a run are those at its end. Returns for
    each repeated run `excess` (nats above the single pass at the end), `best_epoch` (passes at its lowest loss) and
    `rose` (nats from there to its end). Raises UserError where no run is a single pass.
    """
    table = as_table(runs, ("parameters", "tokens", "unique_tokens"))
    rows_R = [np.flatnonzero(table["run"] == r) for r in range(int(table["run"].max()) + 1)]
    ends = [rows[np.argmax(table["tokens"][rows])] for rows in rows_R]
    single = {
        (table["parameters"][i], table["tokens"][i]): table["loss"][i]
        for i in ends
        if table["unique_tokens"][i] >= table["tokens"][i]
    }
    if not single:
        raise UserError("no run saw each of its tokens once; excess is measured beside such a run of equal tokens")
    costs = []
    for rows, end in zip(rows_R, ends, strict=True):
        key = (table["parameters"][end], table["tokens"][end])
        if table["unique_tokens"][end] < table["tokens"][end] and key in single:
            best = rows[np.argmin(table["loss"][rows])]
            costs.append(
                {
                    "parameters": float(key[0]),
                    "epochs": float(table["tokens"][end] / table["unique_tokens"][end]),
                    "excess": float(table["loss"][end] - single[key]),
                    "best_epoch": float(table["tokens"][best] / table["unique_tokens"][best]),
                    "rose": float(table["loss"][end] - table["loss"][best]),
                }
            )
    return costs
