"""Which runs to make: what a procedure asks for, and which affordable run tells most about the target.

`buy` ranks candidate runs by how much each would narrow the target's interval. For draws theta_k of a fitted law let
t_k be the (log) prediction at the target and c_k at the candidate. If a run there is measured with spread s, then to
first order the variance of t falls by

    cov(t, c)^2 / (var(c) + s^2)

(the linear update of a Gaussian; Lindley 1956 for the criterion, Chaloner & Verdinelli 1995 for designs). No refit is
needed; what the law cannot know (the spread of a single run, its drift outside the fitted range) stays in the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.core.errors import UserError

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
