"""power: loss falls as a power of one quantity (FLOPs, tokens or parameters), down to a floor.

    L(x) = E + A / x^gamma

For a series that varies one thing: one model size along its tokens, sizes at equal tokens, or runs that all
sit on the compute-optimal line (x = flops = 6 N D). Loss against compute with an offset follows Hernandez et
al. 2021 (arXiv:2102.01293) and Henighan et al. 2020 (arXiv:2010.14701, equation 1.1). Estimation as for
`chinchilla`; priors: gamma around 0.3 for tokens and parameters, 0.15 for FLOPs (the two-power law along its
own optimum: alpha beta / (alpha + beta)), within a factor 2; E as there; the falling term about half the loss
within a factor 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from modicum.laws.curve import CurveLaw
from modicum.laws.forms import LawConfig, Table

_GAMMA = {"flops": 0.15, "tokens": 0.3, "parameters": 0.3}


@dataclass(frozen=True, kw_only=True)
class Config(LawConfig):
    x: str = "flops"  # the quantity: flops, tokens or parameters
    gamma: float | None = None  # prior median of the exponent; None takes the one above
    gamma_spread: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.x not in _GAMMA:
            raise ValueError(f"x={self.x!r}: allowed are {', '.join(_GAMMA)}")


TOY = Config(draws=300)


class Power(CurveLaw):
    config: Config
    columns = ("flops",)
    coordinates = ("log E", "log A/x0^gamma", "log gamma")
    upper = {"log gamma": float(np.log(10))}
    example = {"E": 1.8, "A": 1500.0, "gamma": 0.17}
    small_example = {"E": 1.8, "A": 470.0, "gamma": 0.17}

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.x,)

    def curve(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        log_x = np.log(x[self.config.x])
        return np.logaddexp(theta_KP[:, 0:1], theta_KP[:, 1:2] - np.exp(theta_KP[:, 2:3]) * log_x)

    def gradient(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        log_x, gamma_K1 = np.log(x[self.config.x]), np.exp(theta_KP[:, 2:3])
        falling_KN = theta_KP[:, 1:2] - gamma_K1 * log_x
        part_KN = np.exp(falling_KN - np.logaddexp(theta_KP[:, 0:1], falling_KN))
        return np.stack([1 - part_KN, part_KN, -part_KN * gamma_K1 * log_x], axis=2)

    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        half = np.log(x["loss"]).mean() - np.log(2)
        gamma = self.config.gamma or _GAMMA[self.config.x]
        return (
            np.array([np.log(self.config.entropy), half, np.log(gamma)]),
            np.array([0.5, 1.0, self.config.gamma_spread]),
        )

    def starts(self, x: Table) -> np.ndarray:
        loss_N, starts = x["loss"], []
        for gamma in np.geomspace(0.03, 1.5, 40):
            basis_N2 = np.stack([np.ones_like(loss_N), x[self.config.x] ** -gamma], axis=1)
            solution, misfit = nnls(basis_N2 / loss_N[:, None], np.ones_like(loss_N))
            starts.append((misfit, [*np.log(np.maximum(solution, 1e-3 * loss_N.mean())), np.log(gamma)]))
        starts.sort(key=lambda item: item[0])
        return np.array([theta for _, theta in starts[:6]] + [self.priors(x)[0]])

    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        gamma = np.exp(theta_KP[:, 2])
        return {
            "E": np.exp(theta_KP[:, 0]),
            "A": np.exp(theta_KP[:, 1] + gamma * np.log(reference[self.config.x])),
            "gamma": gamma,
        }

    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        p = parameters
        return np.array(
            [
                np.log(p["E"]),
                np.log(p["A"]) - p["gamma"] * np.log(reference[self.config.x]),
                np.log(p["gamma"]),
            ]
        )
