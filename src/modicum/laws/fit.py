"""What a law's fit holds, and what it says: parameters, draws, predictions, the best use of a budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from modicum.core.errors import CorruptError


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law. Letters: K draws, P coordinates, Q reported parameters.

    target: what it predicts, "loss", "score" or "change". A law that is no curve of a few parameters keeps what it
    needs in `extra` (JSON-able) and leaves the draws empty.
    parameters: the best value of each parameter, in the law's own units.
    draws_KP: the law's working coordinates (`coordinates`), one row per posterior or bootstrap draw.
    noise_K: for each draw, the Laplace scale of a new run (log loss, score or change) around the law;
    within_K: of one measurement around its run's mean (zero where every run has one row).
    covariance_QQ: covariance of the reported parameters over the draws, in the order of `parameters`.
    """

    law: str
    parameters: dict[str, float]
    points: int
    runs: int
    seed: int
    target: str = "loss"
    method: str = "posterior"  # or "bootstrap", "residuals"
    covariance_QQ: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    best_P: np.ndarray = field(default_factory=lambda: np.zeros(0))
    draws_KP: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    noise_K: np.ndarray = field(default_factory=lambda: np.zeros(0))
    within_K: np.ndarray = field(default_factory=lambda: np.zeros(0))
    coordinates: tuple[str, ...] = ()
    reference: dict[str, float] = field(default_factory=dict)  # geometric mean of each column: where it is centred
    range: dict[str, tuple[float, float]] = field(default_factory=dict)  # smallest and largest value that was fitted
    gap: float = 0.0  # relative excess of a loss before the learning rate is cooled down
    residual: float = 0.0  # mean absolute residual of the fitted rows (of the log loss, the score or the change)
    knobs: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def interval(self, values_KQ: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        tail = (1 - level) / 2
        return np.quantile(values_KQ, tail, axis=0), np.quantile(values_KQ, 1 - tail, axis=0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `Fit.from_dict` gives an equal fit back."""
        record = asdict(self)
        return {
            k: v.tolist() if isinstance(v, np.ndarray) else list(v) if isinstance(v, tuple) else v
            for k, v in record.items()
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Fit:
        try:
            values = dict(record)
            for name in ("covariance_QQ", "best_P", "draws_KP", "noise_K", "within_K"):
                values[name] = np.array(values[name], dtype=float)
            values["coordinates"] = tuple(values["coordinates"])
            values["range"] = {k: (float(v[0]), float(v[1])) for k, v in values["range"].items()}
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"the stored fit cannot be read ({error!r}); fit again") from None


@dataclass(frozen=True)
class Prediction:
    """Loss, score or change at each of N points: the middle, and the interval of a share `level` of new runs."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float

    def rows(self) -> list[dict[str, float]]:
        return [
            {"mean": float(m), "low": float(a), "high": float(b), "level": self.level}
            for m, a, b in zip(self.mean, self.low, self.high, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The model size and token count that reach the lowest loss with `flops`; intervals over the draws."""

    flops: float
    parameters: float
    tokens: float
    parameters_interval: tuple[float, float]
    tokens_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    level: float

    def as_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
