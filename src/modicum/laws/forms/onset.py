"""onset: the two-power law for short runs, whose loss leaves that of an untrained model slowly.

    L(N, D) = E + A / N^alpha + B / (D + D0)^beta,      D0 = ratio * (B / (log V - E))^(1 / beta)

With ratio 1 the token term begins at log V - E, the loss of an untrained model over a vocabulary of V. The
plain power law diverges at D = 0, while a real curve is flat at first (warm-up, few optimizer steps) and falls
faster later; fitted to runs of some ten to some hundred steps it takes the beginning for a small exponent
and predicts too high a loss for longer runs. The prior of the ratio is 2 within a factor of 7 (95%). For runs
much longer than D0 (about a million tokens for the law of `chinchilla`) both forms agree.

Measured on 20 runs of 82 to 529 thousand parameters and 39 to 639 thousand tokens, predicting runs of twice the
tokens or more from random three of them: mean error 3.1% (`chinchilla` 6.0%), 93% inside the 95% interval (56%).

Form and the other priors as `chinchilla` (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3), whose plain
power it replaces; the shift is this project's own. Loss must be in nats per token. The optimal split has no
closed form and is searched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.laws.curve import CurveLaw
from modicum.laws.forms import Table
from modicum.laws.forms.chinchilla import Chinchilla
from modicum.laws.forms.chinchilla import Config as PlainConfig


@dataclass(frozen=True, kw_only=True)
class Config(PlainConfig):
    vocabulary: int = 32000  # of the tokenizer: the loss before training is its logarithm
    ratio: float = 2.0  # prior median and log standard deviation of D0 over its anchor
    ratio_spread: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 2 or self.ratio <= 0 or self.ratio_spread <= 0:
            raise ValueError("vocabulary must be at least 2, ratio and ratio_spread above 0")


TOY = Config(draws=300)


class Onset(Chinchilla):
    config: Config
    coordinates = (*Chinchilla.coordinates, "log ratio")
    example = {"E": 1.8, "A": 480.0, "B": 9000.0, "alpha": 0.35, "beta": 0.37, "D0": 3e8}
    small_example = {"E": 1.6, "A": 60.0, "B": 120.0, "alpha": 0.33, "beta": 0.28, "D0": 6e4}

    def _shift(self, theta_KP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """E, log(log V - E) and log D0, each K1; the difference is held above a twentieth of log V."""
        start = np.log(self.config.vocabulary)
        floor_K1 = np.exp(theta_KP[:, 0:1])
        log_head_K1 = np.log(np.maximum(start - floor_K1, start / 20))
        anchor_K1 = (theta_KP[:, 2:3] - log_head_K1) / np.exp(theta_KP[:, 4:5])
        return floor_K1, log_head_K1, theta_KP[:, 5:6] + anchor_K1

    def _terms(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        log_n, log_d = np.log(x[self.size]), np.log(x["tokens"])
        n_term = theta_KP[:, 1:2] - np.exp(theta_KP[:, 3:4]) * log_n
        d_term = theta_KP[:, 2:3] - np.exp(theta_KP[:, 4:5]) * np.logaddexp(log_d, self._shift(theta_KP)[2])
        return np.stack([np.broadcast_to(theta_KP[:, 0:1], n_term.shape), n_term, d_term])

    def gradient(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        terms = self._terms(theta_KP, x)
        part_3KN = np.exp(terms - np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2]))
        floor_K1, log_head_K1, log_shift_K1 = self._shift(theta_KP)
        log_z_KN = np.logaddexp(np.log(x["tokens"]), log_shift_K1)
        young_KN = part_3KN[2] * np.exp(log_shift_K1 - log_z_KN)  # share of the token term, times D0 / (D + D0)
        beta_K1, start = np.exp(theta_KP[:, 4:5]), np.log(self.config.vocabulary)
        ratio_K1 = np.where(start - floor_K1 > start / 20, floor_K1 / np.exp(log_head_K1), 0.0)
        by_beta = young_KN * (theta_KP[:, 2:3] - log_head_K1) - part_3KN[2] * beta_K1 * log_z_KN
        by_alpha = -part_3KN[1] * np.exp(theta_KP[:, 3:4]) * np.log(x[self.size])
        return np.stack(
            [
                part_3KN[0] - young_KN * ratio_K1,
                part_3KN[1],
                part_3KN[2] - young_KN,
                by_alpha,
                by_beta,
                -young_KN * beta_K1,
            ],
            axis=2,
        )

    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        mean_P, sd_P = super().priors(x)
        return np.append(mean_P, np.log(self.config.ratio)), np.append(sd_P, self.config.ratio_spread)

    def starts(self, x: Table) -> np.ndarray:
        plain_S5 = super().starts(x)[:, :5]
        mean_P, _ = self.priors(x)
        return np.vstack([np.column_stack([plain_S5, np.full(len(plain_S5), mean_P[5])]), mean_P])

    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        shift_K = np.exp(self._shift(theta_KP)[2][:, 0]) * reference["tokens"]
        return super().to_parameters(theta_KP, reference) | {"D0": shift_K}

    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        theta_P = np.append(super().from_parameters(parameters, reference), 0.0)
        anchor = self._shift(theta_P[None])[2][0, 0]
        theta_P[5] = np.log(parameters["D0"] / reference["tokens"]) - anchor
        return theta_P

    def best_split(self, theta_KP: np.ndarray, reference: dict[str, float], flops: float) -> np.ndarray:
        return CurveLaw.best_split(self, theta_KP, reference, flops)
