"""chinchilla: loss falls as a power of the parameters and a power of the tokens, down to a floor.

    L(N, D) = E + A / N^alpha + B / D^beta

fitted by Huber loss (delta 1e-3) on log residuals by a quasi-Newton search, computed by logsumexp, from
several starts. The lowest loss at C = 6 N D FLOPs is at N = G (C/6)^(beta/(alpha+beta)), with G = (alpha
A / (beta B))^(1/(alpha+beta)).

Hoffmann et al. 2022, arXiv:2203.15556, section 3.3 (approach 3) and appendix D; replication by Besiroglu
et al. 2024, arXiv:2404.10102. Departs from the paper: (1) starts are chosen by solving for E, A, B (a
non-negative linear problem) on a grid of exponents, the eight best are refined, by BFGS rather than
L-BFGS (five coordinates need no limited memory); (2) coordinates are centred on the geometric mean of
the data, so exponents and prefactors are nearly uncorrelated; (3) weak priors, which many runs overrule
and three runs need: alpha around 0.34 within a factor 1.6 (95%), beta around 0.31 within a factor 1.8
(published fits: 0.34/0.28 Hoffmann, 0.35/0.37 Besiroglu, 0.35/0.35 Muennighoff et al. 2023), E around
1.7 nats within a factor 2.7, the other two terms each about a third of the loss within a factor 7; (4)
the noise scale is estimated with the law, rows of one run share an error (see `laws.estimate`).
`prior=none` is the paper's fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import nnls

from modicum.laws.curve import CurveLaw
from modicum.laws.forms import LawConfig, Table
from modicum.laws.table import FLOPS_PER_PARAMETER_TOKEN


@dataclass(frozen=True, kw_only=True)
class Config(LawConfig):
    alpha: float = 0.34  # prior median and log standard deviation of the exponents
    alpha_spread: float = 0.25
    beta: float = 0.31
    beta_spread: float = 0.30


TOY = Config(draws=300)


class Chinchilla(CurveLaw):
    config: Config
    columns: ClassVar[tuple[str, ...]] = ("parameters", "tokens")
    size: ClassVar[str] = "parameters"  # the column that counts the parameters
    coordinates: ClassVar[tuple[str, ...]] = ("log E", "log A/N0^alpha", "log B/D0^beta", "log alpha", "log beta")
    upper = {"log alpha": float(np.log(10)), "log beta": float(np.log(10))}
    example = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
    small_example = {"E": 1.8, "A": 60.0, "B": 200.0, "alpha": 0.35, "beta": 0.34}

    def _terms(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        """Logs of the three terms, shape (3, K, N)."""
        log_n, log_d = np.log(x[self.size]), np.log(x["tokens"])
        n_term = theta_KP[:, 1:2] - np.exp(theta_KP[:, 3:4]) * log_n
        d_term = theta_KP[:, 2:3] - np.exp(theta_KP[:, 4:5]) * log_d
        return np.stack([np.broadcast_to(theta_KP[:, 0:1], n_term.shape), n_term, d_term])

    def curve(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        terms = self._terms(theta_KP, x)
        return np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])

    def gradient(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        terms = self._terms(theta_KP, x)
        part_3KN = np.exp(terms - np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2]))
        by_alpha = -part_3KN[1] * np.exp(theta_KP[:, 3:4]) * np.log(x[self.size])
        by_beta = -part_3KN[2] * np.exp(theta_KP[:, 4:5]) * np.log(x["tokens"])
        return np.stack([part_3KN[0], part_3KN[1], part_3KN[2], by_alpha, by_beta], axis=2)

    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        third = np.log(x["loss"]).mean() - np.log(3)
        c = self.config
        return (
            np.array([np.log(c.entropy), third, third, np.log(c.alpha), np.log(c.beta)]),
            np.array([0.5, 1.0, 1.0, c.alpha_spread, c.beta_spread]),
        )

    def starts(self, x: Table) -> np.ndarray:
        loss_N, starts = x["loss"], []
        for alpha in np.geomspace(0.1, 1.5, 12):
            for beta in np.geomspace(0.1, 1.5, 12):
                basis_N3 = np.stack([np.ones_like(loss_N), x[self.size] ** -alpha, x["tokens"] ** -beta], axis=1)
                solution, misfit = nnls(basis_N3 / loss_N[:, None], np.ones_like(loss_N))
                solution = np.log(np.maximum(solution, 1e-3 * loss_N.mean()))
                starts.append((misfit, [*solution, np.log(alpha), np.log(beta)]))
        starts.sort(key=lambda item: item[0])
        mean_P, _ = self.priors(x)
        return np.array([theta for _, theta in starts[:8]] + [mean_P[:5]])

    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        alpha, beta = np.exp(theta_KP[:, 3]), np.exp(theta_KP[:, 4])
        return {
            "E": np.exp(theta_KP[:, 0]),
            "A": np.exp(theta_KP[:, 1] + alpha * np.log(reference[self.size])),
            "B": np.exp(theta_KP[:, 2] + beta * np.log(reference["tokens"])),
            "alpha": alpha,
            "beta": beta,
        }

    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        p = parameters
        return np.array(
            [
                np.log(p["E"]),
                np.log(p["A"]) - p["alpha"] * np.log(reference[self.size]),
                np.log(p["B"]) - p["beta"] * np.log(reference["tokens"]),
                np.log(p["alpha"]),
                np.log(p["beta"]),
            ]
        )

    def best_split(self, theta_KP: np.ndarray, reference: dict[str, float], flops: float) -> np.ndarray:
        p = self.to_parameters(theta_KP, reference)
        power = 1 / (p["alpha"] + p["beta"])
        log_g = power * (np.log(p["alpha"] / p["beta"]) + np.log(p["A"]) - np.log(p["B"]))
        return np.exp(log_g + power * p["beta"] * np.log(flops / FLOPS_PER_PARAMETER_TOKEN))
