"""two-step: a task's score by way of its loss: size and tokens give the task's loss, the loss gives the score.

    step 1    L(N, D) = E + A / N^alpha + B / D^beta              of the task's right answers, in bits per byte
    step 2    s(L)    = low + (high - low) / (1 + exp(k (L - L0)))

The second baseline of the laws of scores. Rows give parameters, tokens, `task_loss` and score. The interval carries the
spread of step 1 through step 2.

Bhagia et al. 2024, arXiv:2412.04403 (OLMo ladder), sections 3.1 and 3.2. Departs: both steps are fitted robustly with
priors and sampled, the paper fits by least squares; checkpoints may serve step 2, finished runs step 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modicum.laws.curve import CurveLaw
from modicum.laws.fit import Fit, Prediction
from modicum.laws.forms import Law, ScoreConfig, Table
from modicum.laws.forms import chinchilla as loss_law
from modicum.laws.forms.end_to_end import refuse_chance
from modicum.laws.table import Runs, as_table, to_columns

CLAIM = {"figure": "within 2 points on four tasks", "where": "abstract", "scale": "190M to 1B runs predict 7B and 13B"}


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    entropy: float = 0.4  # typical floor of a task's loss, bits per byte


TOY = Config(draws=300)


class _Sigmoid(CurveLaw):
    """Step 2: score against the task's loss."""

    target = "score"
    columns = ("task_loss",)
    coordinates: ClassVar[tuple[str, ...]] = ("logit low", "logit high", "L0", "log k")

    def curve(self, theta_KP: np.ndarray, x: Table) -> np.ndarray:
        low, high = (1 / (1 + np.exp(-theta_KP[:, i : i + 1])) for i in (0, 1))
        turn_KN = np.exp(theta_KP[:, 3:4]) * (np.log(x["task_loss"]) - theta_KP[:, 2:3])
        return low + (high - low) / (1 + np.exp(np.clip(turn_KN, -60, 60)))

    def priors(self, x: Table) -> tuple[np.ndarray, np.ndarray]:
        guess = self.config.chance if self.config.chance is not None else float(x["score"].min())
        guess = min(max(guess, 0.01), 0.9)
        mean_P = np.array([np.log(guess / (1 - guess)), 2.0, 0.0, np.log(4.0)])
        return mean_P, np.array([0.15 if self.config.chance is not None else 0.7, 1.0, 0.7, 0.7])

    def starts(self, x: Table) -> np.ndarray:
        mean_P, _ = self.priors(x)
        grid = np.array(
            [
                [mean_P[0], high, at, np.log(k)]
                for high in (0.0, 1.0, 3.0)
                for at in np.linspace(-1.5, 0.7, 12)
                for k in (1, 2, 4, 8)
            ]
        )
        misfit_S = np.abs(self.curve(grid, x) - x["score"]).mean(1)
        return np.vstack([grid[np.argsort(misfit_S, kind="stable")[:8]], mean_P])

    def to_parameters(self, theta_KP: np.ndarray, reference: dict[str, float]) -> dict[str, np.ndarray]:
        low, high = (1 / (1 + np.exp(-theta_KP[:, i])) for i in (0, 1))
        middle = np.exp(theta_KP[:, 2]) * reference["task_loss"]
        return {"low": low, "high": high, "L0": middle, "k": np.exp(theta_KP[:, 3])}

    def from_parameters(self, parameters: dict[str, float], reference: dict[str, float]) -> np.ndarray:
        p = parameters
        low, high = (np.log(p[n] / (1 - p[n])) for n in ("low", "high"))
        return np.array([low, high, np.log(p["L0"] / reference["task_loss"]), np.log(p["k"])])


class TwoStep(Law):
    config: Config
    target = "score"
    columns = ("parameters", "tokens")

    def _parts(self) -> tuple[CurveLaw, CurveLaw]:
        shared = {f.name for f in dataclasses.fields(loss_law.Config)}
        knobs = {
            n: v for n, v in dataclasses.asdict(self.config).items() if n in shared and n not in ("noise", "drift")
        }
        return loss_law.Chinchilla(loss_law.Config(**knobs)), _Sigmoid(self.config)

    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        given = to_columns(runs)
        table = as_table(given, (*self.columns, "task_loss"), target="score")
        refuse_chance(self.config, table)
        first, second = self._parts()
        loss = first.fit({n: v for n, v in given.items() if n != "score"} | {"loss": table["task_loss"]}, seed)
        score = second.fit(given, seed)
        return Fit(
            law="two_step",
            target="score",
            parameters={f"{n} of loss": v for n, v in loss.parameters.items()} | score.parameters,
            points=loss.points,
            runs=loss.runs,
            seed=seed,
            range=loss.range,
            residual=score.residual,
            extra={"loss": loss.as_dict(), "score": score.as_dict()},
            covariance_QQ=_stacked(loss.covariance_QQ, score.covariance_QQ),
        )

    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        first, second = self._parts()
        loss, score = (Fit.from_dict(fit.extra[name]) for name in ("loss", "score"))
        draws_KN = first.sample(loss, points)
        curve_KN = first.curve_at(loss, points)
        mean_N = second.predict(score, {"task_loss": np.exp(np.median(curve_KN, axis=0))}, level).mean
        rng, drawn = np.random.default_rng(fit.seed + 2), []
        for k in rng.integers(len(draws_KN), size=100):  # what the score may be at each loss that it may have
            some_KN = second.sample(score, {"task_loss": draws_KN[k]})
            drawn.append(some_KN[rng.integers(len(some_KN), size=8)])
        low_N, high_N = fit.interval(np.concatenate(drawn), level)
        return Prediction(mean_N, np.minimum(low_N, mean_N), np.maximum(high_N, mean_N), level)

    def simulate(self, rng: np.random.Generator, *, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        law, step = self._parts()
        truth = {"E": 0.4, "A": 300.0, "B": 900.0, "alpha": 0.35, "beta": 0.35}

        def drawn(scale: float, noise: float) -> dict[str, Any]:
            points = law.toy_points(scale=scale)
            loss = law.value(truth, points) * np.exp(noise * rng.normal(size=len(points["tokens"])))
            score = step.value({"low": 0.25, "high": 0.9, "L0": 0.9, "k": 4.0}, {"task_loss": loss})
            return points | {"task_loss": loss, "score": np.clip(score + noise * rng.normal(size=len(score)), 0, 1)}

        return drawn(1.0, noise), {n: v[-4:] for n, v in drawn(4.0, 0.0).items()}


def _stacked(a_QQ: np.ndarray, b_QQ: np.ndarray) -> np.ndarray:
    joint_QQ = np.zeros((len(a_QQ) + len(b_QQ),) * 2)
    joint_QQ[: len(a_QQ), : len(a_QQ)], joint_QQ[len(a_QQ) :, len(a_QQ) :] = a_QQ, b_QQ
    return joint_QQ
