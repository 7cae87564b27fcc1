"""port law: how loss, a score or a change depends on scale: fitted on small runs, it predicts larger ones.

A law is built from its config alone, `fit` takes run records (`laws.table`) and gives a `laws.fit.Fit`, `predict` says
what a new run will reach, with an interval. Most laws are curves of a few parameters and subclass
`laws.curve.CurveLaw`, which estimates, samples and extrapolates for them. A law that is also a procedure says which
runs to make (`runs`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modicum.core.errors import UserError
from modicum.core.registry import Method
from modicum.laws.fit import Fit, Optimum, Prediction
from modicum.laws.plan import RunSpec
from modicum.laws.table import Runs, Table

__all__ = ["BASELINE", "Law", "LawConfig", "ScoreConfig", "Table"]
BASELINE = "chinchilla"


@dataclass(frozen=True, kw_only=True)
class LawConfig:
    """Knobs every curve has.

    prior: "published" adds the form's priors (documented in its card), "none" is the plain robust fit.
    entropy: a typical irreducible loss in the loss's own unit (1.7 nats per token; for bits per byte
        about 0.8): the centre of the prior on E, within a factor of e either way.
    interval: "posterior", "bootstrap", or "auto": bootstrap over runs from `bootstrap_from` runs on.
    noise: prior centre of the spread of a run about the law (seed, data order, misfit): relative for a loss.
    drift: error of the form itself per decade outside the fitted range, one standard deviation (relative for a
        loss); 0.02 is what the intervals needed on published tables (docs/laws.md).
    mixed: fit rows that no one law describes: several learning-rate schedules, data repeated over epochs.
    """

    delta: float = 1e-3
    prior: str = "published"
    entropy: float = 1.7
    interval: str = "auto"
    bootstrap_from: int = 30
    draws: int = 1000
    noise: float = 0.006
    drift: float = 0.02
    gap: float = 0.03
    per_run: int = 4
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.prior not in ("published", "none"):
            raise ValueError(f"prior={self.prior!r}: allowed are published, none")
        if self.interval not in ("auto", "posterior", "bootstrap"):
            raise ValueError(f"interval={self.interval!r}: allowed are auto, posterior, bootstrap")
        if min(self.delta, self.entropy, self.noise, self.gap) <= 0 or self.draws < 50 or self.per_run < 1:
            raise ValueError("delta, entropy, noise and gap must be above 0, draws at least 50, per_run at least 1")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(LawConfig):
    """Knobs of a law of scores; noise and drift are absolute (0.015 is a point and a half of 100).

    chance: what guessing scores (0.25 of four choices); None leaves it to the fit.
    at_chance: fit although no score is above `chance` by two standard errors.
    """

    noise: float = 0.015
    chance: float | None = None
    at_chance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chance is not None and not 0 <= self.chance < 1:
            raise ValueError(f"chance={self.chance} is no share from 0 to 1, such as 0.25 for four choices")


class Law(Method):
    """Base of every law. target: what it predicts, "loss", "score" or "change"; columns: what it reads.

    checkpoints: whether it uses the rows before a run's last; of_sets: whether it predicts a benchmark from its
    `item`s.
    """

    target: ClassVar[str] = "loss"
    columns: ClassVar[tuple[str, ...]] = ("parameters", "tokens")
    checkpoints: ClassVar[bool] = False
    of_sets: ClassVar[bool] = False

    def __init__(self, config: Any):
        self.config = config

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns this law reads with its present knobs."""
        return self.columns

    @abstractmethod
    def fit(self, runs: Runs, seed: int = 0) -> Fit:
        """Fit the law to run records. Raises UserError for rows it cannot use."""

    @abstractmethod
    def predict(self, fit: Fit, points: Runs, level: float = 0.95) -> Prediction:
        """The target of a new, finished run at each of `points`: a prediction interval."""

    @abstractmethod
    def simulate(self, rng: np.random.Generator, *, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run records that this law describes (with `noise`), and larger, noise-free ones: for conformance."""

    def runs(self, flops: float) -> list[RunSpec]:
        """The runs to make for a fit, within `flops` altogether. Raises UserError where a law has no opinion."""
        raise UserError(f"the law {type(self).__module__.rsplit('.', 1)[-1]} does not say which runs to make")

    def optimum(self, fit: Fit, flops: float, level: float = 0.95) -> Optimum:
        """The split of `flops` = 6 N D into parameters N and tokens D that reaches the lowest loss."""
        raise UserError(
            f"the law {fit.law!r} reads {', '.join(self.reads)}, so it cannot split a budget "
            "between parameters and tokens; fit --law chinchilla"
        )
