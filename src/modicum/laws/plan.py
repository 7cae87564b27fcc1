"""Which runs to make: what a procedure asks for, which affordable run tells most about the target, what a budget buys.

`buy` ranks candidate runs by how much each would narrow the target's interval. For draws theta_k of a fitted law let
t_k be the (log) prediction at the target and c_k at the candidate. If a run there is measured with spread s, then to
first order the variance of t falls by

    cov(t, c)^2 / (var(c) + s^2)

(the linear update of a Gaussian; Lindley 1956 for the criterion, Chaloner & Verdinelli 1995 for designs). No refit is
needed; what the law cannot know (the spread of a single run, its drift outside the fitted range) stays in the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.table import FLOPS_PER_PARAMETER_TOKEN

if TYPE_CHECKING:
    from modicum.laws.curve import CurveLaw
    from modicum.laws.fit import Fit


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training run that a procedure asks for. checkpoints: how many losses to record, evenly in tokens."""

    parameters: float
    tokens: float
    batch_tokens: float | None = None
    schedule: str = "any"  # "constant": every checkpoint is as good as a finished run; "any": the target's own
    checkpoints: int = 1
    seed: int = 0
    unique_tokens: float | None = None
    why: str = ""

    @property
    def flops(self) -> float:
        return 6.0 * self.parameters * self.tokens

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None} | {"flops": self.flops}


def buy(
    law: CurveLaw, fit: Fit, target: dict[str, float], candidates: Sequence[dict[str, float]], level: float = 0.95
) -> list[dict[str, Any]]:
    """Candidates, the most telling first: each with `narrows` (share of the target's interval) and `width` after it."""
    if not len(fit.draws_KP):
        raise UserError(f"the law {fit.law!r} has no draws to plan with; take a curve such as chinchilla")
    if not candidates:
        raise UserError("no run to choose from; name some with --candidate parameters=1e8,tokens=2e9")
    rows = [target, *candidates]
    if odd := [name for name in law.reads if name != "flops" and any(name not in row for row in rows)]:
        raise UserError(f"target and candidates must give {', '.join(law.reads)}; {', '.join(odd)} is missing")
    points = {name: [row.get(name, np.nan) for row in rows] for name in {k for row in rows for k in row}}
    values_KN = law.curve_at(fit, points)
    target_K, candidate_KN = values_KN[:, 0], values_KN[:, 1:]
    own_N = candidate_KN.var(0)
    covariance_N = ((target_K - target_K.mean())[:, None] * (candidate_KN - candidate_KN.mean(0))).mean(0)
    spread = 2 * float((fit.noise_K**2 + fit.within_K**2).mean())  # a Laplace scale s has variance 2 s^2
    gain_N = covariance_N**2 / (own_N + spread)
    outside = law.drift_at(fit, {name: [column[0]] for name, column in points.items()})[0]
    now = float(target_K.var() + spread + outside**2)
    prediction = law.predict(fit, {name: [column[0]] for name, column in points.items()}, level)
    width = float(prediction.high[0] - prediction.low[0])
    after_N = np.sqrt(np.maximum(now - gain_N, 0) / now)
    order = np.argsort(after_N, kind="stable")
    return [
        dict(candidates[i])
        | {"narrows": float(1 - after_N[i]), "width": float(width * after_N[i]), "width_now": width, "level": level}
        for i in order
    ]


def affordable(fit: Fit, flops: float) -> list[dict[str, float]]:
    """Runs within `flops`: sizes and tokens from half the smallest that was fitted to 4 times the largest."""
    if not {"parameters", "tokens"} <= fit.range.keys():
        raise UserError(f"the law {fit.law!r} does not read parameters and tokens; name the runs: --buy parameters=...")
    grids = [np.geomspace(low / 2, 4 * high, 7) for low, high in (fit.range["parameters"], fit.range["tokens"])]
    candidates = [
        {"parameters": float(n), "tokens": float(d)} for n in grids[0] for d in grids[1] if 6 * n * d <= flops
    ]
    if not candidates:
        raise UserError(
            f"{flops:.3g} FLOPs afford no run near those fitted; the cheapest takes {6 * grids[0][0] * grids[1][0]:.3g}"
        )
    return candidates


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one budget buys: the size and tokens of the lowest predicted loss, each with its interval over the draws;
    rows: what other sizes give. beyond: decades between the largest run that was fitted and this one."""

    parameters: float
    tokens: float
    flops: float
    seconds: float | None
    parameters_interval: tuple[float, float]
    tokens_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    level: float
    beyond: float
    rows: list[dict[str, float]]

    def as_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Rate:
    """Seconds per token of a training run by its parameters, from measured runs.

    A power of the size between the sizes that were measured. Below them no faster than the smallest (a step has fixed
    costs), above them in proportion to the size (no more FLOPs per second than the largest).
    """

    smallest: float
    largest: float
    at_largest: float  # seconds per token
    power: float

    def __call__(self, parameters: np.ndarray) -> np.ndarray:
        size_N = np.asarray(parameters, float)
        within_N = size_N.clip(self.smallest, self.largest) / self.largest
        second_N: np.ndarray = self.at_largest * within_N**self.power * np.maximum(size_N / self.largest, 1)
        return second_N


def seconds_per_token(runs: Mapping[str, Any]) -> Rate:
    """The rate of runs that give `seconds`, by least squares in logarithms. Raises UserError where none does."""
    given = [] if "seconds" not in runs else zip(runs["parameters"], runs["tokens"], runs["seconds"], strict=True)
    rows = [(float(n), float(s) / float(d)) for n, d, s in given if s and np.isfinite(float(s))]
    if not rows:
        raise UserError("the run records have no column seconds, so a time buys no tokens; write --budget 1e15flop")
    size_N, second_N = np.log(np.array(rows)).T
    largest, power = size_N.max(), 0.0
    if np.ptp(size_N) > 0:
        power = float(np.clip(np.polyfit(size_N, second_N, 1)[0], 0, 1))
    at_largest = float(np.exp((second_N - power * (size_N - largest)).mean()))
    return Rate(float(np.exp(size_N.min())), float(np.exp(largest)), at_largest, power)


def split(
    law: CurveLaw,
    fit: Fit,
    *,
    flops: float | None = None,
    seconds: float | None = None,
    rate: Rate | None = None,
    level: float = 0.95,
    sizes: int = 200,
) -> Split:
    """The best size and tokens for `flops` = 6 N D, or for `seconds` at `rate`.

    Sizes from a quarter of the smallest that was fitted to 1,000 times the largest are tried.
    """
    if set(law.reads) != {"parameters", "tokens"} or law.target != "loss":
        raise UserError(
            f"the law {fit.law!r} cannot split a budget between parameters and tokens; fit --law chinchilla"
        )
    if (flops is None) == (seconds is None) or (seconds is not None and rate is None):
        raise UserError("give one budget, a time or FLOPs: --budget 30m or --budget 1e15flop")
    low, high = fit.range["parameters"]
    size_G = np.geomspace(low / 4, 1000 * high, sizes)
    if flops is not None:
        token_G = flops / (FLOPS_PER_PARAMETER_TOKEN * size_G)
    else:
        assert seconds is not None and rate is not None
        token_G = seconds / rate(size_G)
    usable = token_G >= 1
    if not usable.any():
        raise UserError("the budget trains not even the smallest model on one token; give more")
    size_G, token_G = size_G[usable], token_G[usable]
    curve_KG = law.curve_at(fit, {"parameters": size_G, "tokens": token_G})
    best = int(np.median(curve_KG, axis=0).argmin())
    chosen_K = curve_KG.argmin(1)
    steps = [i for i in (best + round(k * _doubling(size_G)) for k in (-2, -1, 0, 1, 2)) if 0 <= i < len(size_G)]
    at = {"parameters": size_G[steps], "tokens": token_G[steps]}
    prediction = law.predict(fit, at, level)
    rows = [
        {"parameters": float(size_G[i]), "tokens": float(token_G[i]), "loss": row["mean"]}
        | {"low": row["low"], "high": row["high"]}
        for i, row in zip(steps, prediction.rows(), strict=True)
    ]
    here = rows[steps.index(best)]
    tail = (1 - level) / 2
    spent = FLOPS_PER_PARAMETER_TOKEN * size_G[best] * token_G[best]
    largest = FLOPS_PER_PARAMETER_TOKEN * high * fit.range["tokens"][1]
    return Split(
        parameters=here["parameters"],
        tokens=here["tokens"],
        flops=float(spent),
        seconds=seconds,
        parameters_interval=_range(size_G[chosen_K], tail),
        tokens_interval=_range(token_G[chosen_K], tail),
        loss=here["loss"],
        loss_interval=(here["low"], here["high"]),
        level=level,
        beyond=float(np.log10(spent / largest)),
        rows=rows,
    )


def _doubling(size_G: np.ndarray) -> float:
    """Grid steps of a factor of two."""
    return float(np.log(2) / np.log(size_G[1] / size_G[0])) if len(size_G) > 1 else 1.0


def _range(values_K: np.ndarray, tail: float) -> tuple[float, float]:
    low, high = np.quantile(values_K, [tail, 1 - tail])
    return float(low), float(high)
