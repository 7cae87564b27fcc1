"""Two models on the same items: the paired difference and its standard error.

Both models answer the same questions, so most of the spread between questions cancels in the difference
(Miller 2024, arXiv:2411.00640, section 4.2): with correlation rho between the models' answers the variance
of the difference is lower by 2 rho sqrt(var A var B) than for independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from modicum.core.errors import UserError


def paired(a_N: Sequence[float], b_N: Sequence[float]) -> dict[str, float]:
    """Mean of a - b over items, its standard error, 95% interval, and how often a is above, below, equal."""
    a, b = np.asarray(a_N, dtype=float), np.asarray(b_N, dtype=float)
    if a.shape != b.shape or not len(a):
        raise UserError(f"a paired comparison needs the same items of both models; got {len(a)} and {len(b)}")
    difference = a - b
    stderr = float(difference.std(ddof=1) / math.sqrt(len(a))) if len(a) > 1 else math.nan
    return _verdict(float(difference.mean()), stderr, difference)


def paired_ratio(
    a_N: Sequence[float], b_N: Sequence[float], size_N: Sequence[float], resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """The same for sum(a)/sum(size) - sum(b)/sum(size), such as bits per byte; error by paired bootstrap."""
    a, b, size = (np.asarray(v, dtype=float) for v in (a_N, b_N, size_N))
    if not a.shape == b.shape == size.shape or not len(a):
        raise UserError(f"a paired comparison needs the same documents of both models; got {len(a)} and {len(b)}")
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples if len(a) > 1 else 0):
        picked = rng.integers(len(a), size=len(a))
        found.append((a[picked].sum() - b[picked].sum()) / size[picked].sum())
    stderr = float(np.std(found, ddof=1)) if found else math.nan
    return _verdict(float((a.sum() - b.sum()) / size.sum()), stderr, a - b)


def _verdict(mean: float, stderr: float, difference: np.ndarray) -> dict[str, float]:
    return {
        "difference": mean,
        "stderr": stderr,
        "low": mean - 1.96 * stderr,
        "high": mean + 1.96 * stderr,
        "items": len(difference),
        "above": int((difference > 0).sum()),
        "below": int((difference < 0).sum()),
        "equal": int((difference == 0).sum()),
    }


def compare(results_a: Sequence[Any], results_b: Sequence[Any]) -> list[dict[str, Any]]:
    """One row per task and figure that both have: both values and the paired difference A - B."""
    others = {result.task: result for result in results_b}
    rows: list[dict[str, Any]] = []
    for a in results_a:
        b = others.get(a.task)
        if b is None:
            continue
        of_b = {row["id"]: row for row in b.rows}
        pairs = [(row, of_b[row["id"]]) for row in a.rows if row["id"] in of_b]
        for name in a.figures:
            if name not in b.figures or not pairs:
                continue
            if name == "bits_per_byte":
                bits_a, bits_b, size = (
                    [float(pair[i][key]) for pair in pairs] for i, key in ((0, "bits"), (1, "bits"), (0, "bytes"))
                )
                said = paired_ratio(bits_a, bits_b, size)
            elif all(name in x and name in y for x, y in pairs):
                said = paired([x[name] for x, _ in pairs], [y[name] for _, y in pairs])
            else:
                continue
            rows.append(
                {
                    "task": a.task,
                    "figure": name,
                    "a": a.figures[name]["value"],
                    "b": b.figures[name]["value"],
                    **said,
                }
            )
    return rows
