"""How long a step of the engine takes, from what is in it: a small nonnegative linear model.

A step computes *chunks* (n tokens of a prompt, of which `start` are cached) and *decodes* (one token each).
Sums over these describe it (`Load`), and the seconds are a nonnegative combination of them:

    seconds = a0 + a1 tokens + sum_k bk min(tokens, k)        what every token passes through; few are dearer
            + c1 chunks + c2 pairs + c3 late_pairs + c4 reach   attention of chunks (late: behind cached tokens)
            + d1 decodes + d2 cached                            attention of decodes: context that is read

The coefficients are fitted to measured steps so that the *relative* errors are small (each row is divided by
its seconds), with nonnegative least squares, so that the model never promises time back for more work. The
same sums as in Vidur (Agrawal et al. 2024, arXiv:2405.05465, section 4), but one linear model of the whole
step in place of a regressor per operator.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modicum.core.errors import UserError
from modicum.core.files import atomic_file

KNEES = (8, 32, 128)  # row lengths up to which a token may be dearer than beyond
TERMS = (
    "step",
    "tokens",
    *(f"first {k} tokens" for k in KNEES),
    "chunks",
    "pairs",
    "late pairs",
    "reach",
    "decodes",
    "cached",
)
FORMAT = 2


class Load(NamedTuple):
    """Sums over the sequences of a step. `pairs` counts query-key products, `reach` and `cached` keys read."""

    tokens: int = 0
    chunks: int = 0
    pairs: float = 0.0  # of chunks from a prompt's start
    late_pairs: float = 0.0  # of chunks behind cached tokens
    reach: int = 0
    decodes: int = 0
    cached: int = 0

    def plus(self, start: int, n: int) -> Load:
        """With `n` more tokens of a sequence that has `start` tokens cached."""
        t, p, a, b, r, d, h = self
        if n == 1:
            return Load(t + 1, p, a, b, r, d + 1, h + start + 1)
        if start == 0:
            return Load(t + n, p + 1, a + n * n / 2, b, r, d, h)
        return Load(t + n, p + 1, a, b + n * (start + n / 2), r + start + n, d, h)

    @classmethod
    def of(cls, works: Iterable[tuple[int, int]]) -> Load:
        """Of a step that computes `n` tokens behind `start`, for each (start, n)."""
        load = cls()
        for start, n in works:
            load = load.plus(start, n)
        return load

    def terms(self) -> tuple[float, ...]:
        t, p, a, b, r, d, h = self
        return (1.0, t, *(min(t, k) for k in KNEES), p, a, b, r, d, h)


@dataclass(frozen=True)
class StepTime:
    """Coefficients in seconds, in the order of `TERMS`.

    `spread`: the measured step is longer than predicted by more than this factor once in a hundred steps.
    `about`: what was measured, and how well the model does on held-out steps.
    """

    coefficients: tuple[float, ...]
    spread: float = 1.0
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.coefficients) != len(TERMS):
            raise UserError(
                f"a step's time has {len(TERMS)} coefficients ({', '.join(TERMS)}), got {len(self.coefficients)}"
            )

    def seconds(self, load: Load) -> float:
        """Written out, since plans ask for it many times; `Load.terms` says the same."""
        t, p, a, b, r, d, h = load
        if not t:
            return 0.0
        x = self.coefficients
        few = sum(c * (t if t < k else k) for c, k in zip(x[2 : 2 + len(KNEES)], KNEES, strict=True) if c)
        y = x[2 + len(KNEES) :]
        return x[0] + x[1] * t + few + y[0] * p + y[1] * a + y[2] * b + y[3] * r + y[4] * d + y[5] * h

    def most(self, load: Load, start: int, left: int, limit: float) -> int:
        """The most tokens (0 to `left`) behind `start` that keep `load` with them within `limit` seconds."""
        if self.seconds(load.plus(start, left)) <= limit:
            return left
        low, high = 0, left  # `low` fits, `high` does not; time grows with n
        while high - low > 1:
            middle = (low + high) // 2
            if self.seconds(load.plus(start, middle)) <= limit:
                low = middle
            else:
                high = middle
        return low

    def save(self, path: str | Path) -> None:
        with atomic_file(path, "w") as file:
            json.dump({"format": FORMAT, "terms": TERMS} | asdict(self), file, indent=2)

    @classmethod
    def load(cls, path: str | Path) -> StepTime:
        """Raises `UserError` for a file that is none of ours."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            if value["format"] != FORMAT or tuple(value["terms"]) != TERMS:
                raise ValueError("written by another version")
            return cls(tuple(map(float, value["coefficients"])), float(value["spread"]), dict(value["about"]))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; make one with modicum simulate --calibrate") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a calibration of step times ({error}); make one with modicum simulate --calibrate"
            ) from None


def fit(loads: Sequence[Load], seconds: Sequence[float] | np.ndarray) -> StepTime:
    """Nonnegative least squares of relative errors; steps out of all proportion are left out once."""
    from scipy.optimize import nnls

    A = np.array([load.terms() for load in loads], dtype=np.float64)
    y = np.asarray(seconds, dtype=np.float64)
    scale = A.max(axis=0)
    scale[scale == 0] = 1.0
    keep = np.ones(len(y), dtype=bool)
    for _ in range(2):
        x, _norm = nnls(A[keep] / scale / y[keep, None], np.ones(int(keep.sum())), maxiter=50 * A.shape[1])
        ratio = y / np.maximum(A / scale @ x, 1e-12)
        off = np.abs(np.log(ratio))
        keep = off <= max(4 * float(np.median(off)), 0.2)
        if keep.sum() < A.shape[1]:
            break
    return StepTime(tuple(map(float, x / scale)), max(1.0, float(np.quantile(ratio, 0.99))))


def errors(model: StepTime, loads: Sequence[Load], seconds: Sequence[float] | np.ndarray) -> np.ndarray:
    """|predicted - measured| / measured, of each step."""
    predicted = np.array([model.seconds(load) for load in loads])
    return np.asarray(np.abs(predicted - seconds) / seconds)


class Learner:
    """Fits the model while serving: from the last `memory` steps, anew after every `every`."""

    def __init__(self, memory: int = 512, every: int = 64, least: int = 24):
        import scipy.optimize  # noqa: F401  (now, not in the midst of serving)

        self.loads: deque[Load] = deque(maxlen=memory)
        self.seconds: deque[float] = deque(maxlen=memory)
        self.every, self.least = every, least
        self.seen = 0
        self.model: StepTime | None = None

    def add(self, load: Load, seconds: float) -> None:
        if seconds <= 0 or not load.tokens:
            return
        self.loads.append(load)
        self.seconds.append(seconds)
        self.seen += 1
        if self.seen == self.least or self.seen % self.every == 0:
            self.model = fit(self.loads, self.seconds)
