"""end-to-end: a task's score straight from compute (or from the task's loss), by one bounded exponential.

    s(C) = g + (1 - g) exp(-a C^-b - c)

rises from g, what guessing scores, to g + (1 - g) exp(-c): four parameters, no loss in between. The baseline of the
laws of scores: what claims to predict a benchmark is held against it. `x=task_loss` reads the task's own loss instead
of FLOPs.

The form is the one that Xu et al. 2025 (arXiv:2502.17262, section 3) fit per cluster and compare with end to end.
Departs: fitted robustly with priors (g near `chance` where that is given; b around 0.4 within a factor of three; the
ceiling near 0.9), with binomial noise where rows give `items`; the paper fits by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.curve import CurveLaw
from modicum.laws.forms import ScoreConfig, Table

COLUMNS = ("flops", "tokens", "parameters", "task_loss")


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    x: str = "flops"  # flops, tokens, parameters, or task_loss (of the task's right answers)
    exponent: float = 0.4  # prior median of b and its log standard deviation
    exponent_spread: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.x not in COLUMNS:
            raise ValueError(f"x={self.x!r}: allowed are {', '.join(COLUMNS)}")


TOY = Config(draws=300)


class EndToEnd(CurveLaw):
    config: Config
    target = "score"
    columns = ("flops",)
    coordinates: ClassVar[tuple[str, ...]] = ("logit g", "log a/C0^b", "log b", "log c")
    example = {"g": 0.25, "a": 6.0e6, "b": 0.36, "c": 0.12}

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.x,)

    def curve(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        sign = 1.0 if self.config.x == "task_loss" else -1.0  # scores fall as the loss rises
        falling_KN = np.exp(theta_KP[:, 1:2] + sign * np.exp(theta_KP[:, 2:3]) * np.log(x[self.config.x]))
        floor_K1 = 1 / (1 + np.exp(-theta_KP[:, 0:1]))
        return floor_K1 + (1 - floor_K1) * np.exp(-falling_KN - np.exp(theta_KP[:, 3:4]))

    def check_rows(self, runs: dict[str, object], table: Table) -> None:
        super().check_rows(runs, table)
        refuse_chance(self.config, table)

    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        c = self.config
        guess = c.chance if c.chance is not None else float(x["score"].min())
        guess = min(max(guess, 0.01), 0.9)
        spread = 0.15 if c.chance is not None else 0.7
        mean_P = np.array([np.log(guess / (1 - guess)), 0.0, np.log(c.exponent), np.log(0.1)])
        return mean_P, np.array([spread, 1.5, c.exponent_spread, 1.0])

    def starts(self, x: Table) -> np.ndarray:
        mean_P, _ = self.priors(x)
        grid = np.array(
            [
                [mean_P[0] + shift, a, b, np.log(c)]
                for shift in (0.0, -0.5)
                for a in np.linspace(-3, 3, 9)
                for b in np.log([0.1, 0.2, 0.4, 0.8, 1.6])
                for c in (0.02, 0.1, 0.4)
            ]
        )
        misfit_S = np.abs(self.curve(grid, x) - x["score"]).mean(1)
        return np.vstack([grid[np.argsort(misfit_S, kind="stable")[:8]], mean_P])

    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        b, sign = np.exp(theta_KP[:, 2]), 1.0 if self.config.x == "task_loss" else -1.0
        return {
            "g": 1 / (1 + np.exp(-theta_KP[:, 0])),
            "a": np.exp(theta_KP[:, 1] - sign * b * np.log(reference[self.config.x])),
            "b": b,
            "c": np.exp(theta_KP[:, 3]),
        }

    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        p, sign = parameters, 1.0 if self.config.x == "task_loss" else -1.0
        shift = sign * p["b"] * np.log(reference[self.config.x])
        return np.array([np.log(p["g"] / (1 - p["g"])), np.log(p["a"]) + shift, np.log(p["b"]), np.log(p["c"])])


def refuse_chance(config: ScoreConfig, table: Table) -> None:
    """Refuse scores that say nothing: none is above chance by two standard errors."""
    if config.chance is None or config.at_chance:
        return
    error_N = np.sqrt(config.noise**2 + config.chance * (1 - config.chance) / table["items"])
    if (table["score"] < config.chance + 2 * error_N).all():
        raise UserError(
            f"every score lies at chance ({config.chance:.0%}; the best is {table['score'].max():.1%}), which predicts "
            "nothing; give larger models or more items, or fit all the same with at_chance=true"
        )
