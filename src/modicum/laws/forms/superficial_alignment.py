"""superficial-alignment: a score against the number of finetuning examples, as a power law that goes on.

    1 - s(D) = c + a (1 + D)^-b                 form=bounded, for any D from 0 on
    s(D)     = k (1 + D)^(1/b)                  form=power, the paper's, unbounded

The superficial-alignment hypothesis says that a handful of examples is all that finetuning needs. If so, b is large
and the curve flat after the first hundred; the paper finds power laws for mathematics, code and multi-hop questions,
while *style* is learnt from few. So fit two figures of one run apart: the share of replies in the wanted form, and the
score among those (`examples_to_reach` says where each has got most of the way). Subsets must be nested: 100 of the 300
of the 1,000.

Raghavendra et al. 2024, arXiv:2410.03717, abstract (the body was not read). Departs: the bounded form is this
project's, (1 + D) in place of D lets the untuned model be a point; binomial noise where rows give `items`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.curve import CurveLaw
from modicum.laws.forms import ScoreConfig, Table

CLAIM = {
    "figure": "power laws in the number of examples across capabilities",
    "where": "abstract",
    "scale": "Llama-3, Mistral",
}
NOT_MEASURABLE = (
    "finetuned on 10 to 300 examples (evidence/runs/examples.jsonl), a model of 135M learns form and skill at once, "
    "between 100 and 300: two points above zero fit no curve"
)


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    form: str = "bounded"  # bounded or power

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("bounded", "power"):
            raise ValueError(f"form={self.form!r}: allowed are bounded, power")


TOY = Config(draws=300)


class SuperficialAlignment(CurveLaw):
    config: Config
    target = "score"
    columns = ("examples",)
    example = {"c": 0.2, "a": 0.6, "b": 0.3}

    @property
    def coordinates(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("logit c", "log a", "log b") if self.config.form == "bounded" else ("log k", "log b")

    def curve(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        log_d_N = np.log1p(x["examples"])
        if self.config.form == "power":
            return np.exp(np.minimum(theta_KP[:, 0:1] + np.exp(-theta_KP[:, 1:2]) * log_d_N, 3.0))
        floor_K1 = 1 / (1 + np.exp(-theta_KP[:, 0:1]))
        return 1 - floor_K1 - np.exp(theta_KP[:, 1:2] - np.exp(theta_KP[:, 2:3]) * log_d_N)

    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        if self.config.form == "power":
            return np.array([np.log(max(x["score"].mean(), 0.02)), np.log(5.0)]), np.array([1.5, 1.0])
        error = float(np.clip(1 - x["score"].max(), 0.02, 0.9))
        floor = error / 2
        return np.array([np.log(floor / (1 - floor)), np.log(0.5), np.log(0.3)]), np.array([1.0, 0.7, 0.8])

    def starts(self, x: Table) -> np.ndarray:
        mean_P, _ = self.priors(x)
        slopes = np.log([0.05, 0.1, 0.2, 0.4, 0.8, 1.5])
        if self.config.form == "power":
            grid = np.array([[k, -b] for k in np.log([0.02, 0.05, 0.1, 0.2, 0.4, 0.7]) for b in slopes])
        else:
            floors = [np.log(f / (1 - f)) for f in (0.02, 0.1, 0.2, 0.4, 0.6, 0.8)]
            grid = np.array([[f, a, b] for f in floors for a in np.log([0.1, 0.3, 0.6, 0.9]) for b in slopes])
        misfit_S = np.abs(self.curve(grid, x) - x["score"]).mean(1)
        return np.vstack([grid[np.argsort(misfit_S, kind="stable")[:6]], mean_P])

    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        if self.config.form == "power":
            return {"k": np.exp(theta_KP[:, 0]), "b": np.exp(theta_KP[:, 1])}
        return {"c": 1 / (1 + np.exp(-theta_KP[:, 0])), "a": np.exp(theta_KP[:, 1]), "b": np.exp(theta_KP[:, 2])}

    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        p = parameters
        if self.config.form == "power":
            return np.log([p["k"], p["b"]])
        return np.array([np.log(p["c"] / (1 - p["c"])), np.log(p["a"]), np.log(p["b"])])

    def toy_points(self, n: int = 6, scale: float = 1.0) -> dict[str, np.ndarray]:
        sizes = np.array([0, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000], float)
        return {"examples": np.repeat(scale * sizes, 2)}

    def examples_to_reach(self, parameters: dict[str, float], fraction: float = 0.9) -> float:
        """Examples after which `share` of the whole gain from 0 to unlimited examples is reached (bounded form)."""
        if self.config.form == "power":
            raise UserError("the unbounded form has no end to reach; fit form=bounded")
        if not 0 < fraction < 1:
            raise UserError(f"fraction={fraction} must lie between 0 and 1")
        return float((1 - fraction) ** (-1 / parameters["b"]) - 1)
