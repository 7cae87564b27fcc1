"""Two models on the same items: paired tests, clustered errors, and what a comparison of this size can find at all.

Both models answer the same questions, so most of the spread between questions cancels in the difference (Miller 2024,
arXiv:2411.00640, section 4.2): with correlation rho between the models' answers the variance of the difference is
lower by 2 rho sqrt(var A var B) than for independent samples. Items that share a passage, a subject or a template are
no independent draws; their errors are summed within the cluster first (section 2.2):

    se = sqrt( sum_c ( sum_{i in c} (x_i - mean) )^2 ) / n

Right-or-wrong figures are tested by the exact McNemar test on the items on which the models differ, the tests of one
call are corrected by Holm's method, and the minimum detectable difference says what would have been found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from modicum.core.errors import UserError

POWER = 0.8  # at which the minimum detectable difference is stated
LEVEL = 0.05
Z_LEVEL, Z_POWER = 1.959964, 0.841621  # normal quantiles of 1 - LEVEL / 2 and of POWER


def clustered_error(values_N: Sequence[float], clusters_N: Sequence[Any] | None = None) -> float:
    """Standard error of the mean over items; those with equal `clusters_N` are one draw."""
    values = np.asarray(values_N, dtype=float)
    n = len(values)
    if n < 2:
        return math.nan
    if clusters_N is None:
        return float(values.std(ddof=1) / math.sqrt(n))
    if len(clusters_N) != n:
        raise UserError(f"{n} items have {len(clusters_N)} cluster labels; every item needs one")
    index = {label: i for i, label in enumerate(dict.fromkeys(clusters_N))}
    if len(index) < 2:
        return math.nan
    sums_C = np.bincount([index[label] for label in clusters_N], values - values.mean(), len(index))
    # The small-sample factor makes clusters of one item the usual standard error.
    return float(math.sqrt((sums_C**2).sum() * len(index) / (len(index) - 1)) / n)


def mcnemar(right_a: Sequence[float], right_b: Sequence[float]) -> dict[str, float]:
    """Exact two-sided test on items that one model has right and the other wrong.

    Under the null each of these goes either way with probability 1/2, so p = min(1, 2 P(X <= min(b, c))) for X
    binomial.
    """
    a, b = np.asarray(right_a, dtype=float), np.asarray(right_b, dtype=float)
    if a.shape != b.shape or not set(np.unique(a)) | set(np.unique(b)) <= {0.0, 1.0}:
        raise UserError("the McNemar test takes one 0 or 1 per item and model, for the same items")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return {"only_a": only_a, "only_b": only_b, "p": sign_test(only_a, only_b)}


def sign_test(one: int, other: int) -> float:
    """Two-sided p of a fair coin that fell `one` and `other` times on its sides; exact."""
    n, few = one + other, min(one, other)
    if n == 0 or one == other:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.exp(_logsumexp(logs)))


def _logsumexp(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(sum(math.exp(v - top) for v in logs))


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for testing all: the k-th smallest times the number not yet passed, never falling (Holm 1979)."""
    order, adjusted, highest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def detectable(stderr: float) -> float:
    """The true difference that a two-sided test at 5% finds in 80% of cases, by the difference's standard error."""
    return (Z_LEVEL + Z_POWER) * stderr


def two_sided(difference: float, stderr: float) -> float:
    """p of a difference under a normal distribution."""
    if not stderr > 0:
        return 1.0 if difference == 0 or stderr != stderr else 0.0
    return math.erfc(abs(difference) / stderr / math.sqrt(2))


def unpaired(a_N: Sequence[float], b_N: Sequence[float]) -> dict[str, float]:
    """The z-test for independent samples: what not to use on the same items, kept to show what it misses."""
    a, b = np.asarray(a_N, dtype=float), np.asarray(b_N, dtype=float)
    stderr = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    difference = float(a.mean() - b.mean())
    return {"difference": difference, "stderr": stderr, "p": two_sided(difference, stderr)}


def paired(a_N: Sequence[float], b_N: Sequence[float], clusters_N: Sequence[Any] | None = None) -> dict[str, float]:
    """Mean of a - b over items: standard error (clustered), 95% interval, p, minimum detectable difference, counts.

    p is exact McNemar's where both are right-or-wrong and no clusters are given, else by the normal distribution.
    """
    a, b = np.asarray(a_N, dtype=float), np.asarray(b_N, dtype=float)
    if a.shape != b.shape or not len(a):
        raise UserError(f"a paired comparison needs the same items of both models; got {len(a)} and {len(b)}")
    difference = a - b
    verdict = _verdict(float(difference.mean()), clustered_error(difference, clusters_N), difference)
    if clusters_N is None and set(np.unique(a)) | set(np.unique(b)) <= {0.0, 1.0}:
        verdict |= {"p": mcnemar(a.tolist(), b.tolist())["p"]}
    return verdict


def paired_ratio(
    a_N: Sequence[float],
    b_N: Sequence[float],
    size_N: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
    clusters_N: Sequence[Any] | None = None,
) -> dict[str, float]:
    """The same for sum(a)/sum(size) - sum(b)/sum(size), such as bits per byte; error by bootstrap of clusters."""
    a, b, size = (np.asarray(v, dtype=float) for v in (a_N, b_N, size_N))
    if not a.shape == b.shape == size.shape or not len(a):
        raise UserError(f"a paired comparison needs the same documents of both models; got {len(a)} and {len(b)}")
    difference = a - b
    if clusters_N is not None:
        index = {label: i for i, label in enumerate(dict.fromkeys(clusters_N))}
        where = [index[label] for label in clusters_N]
        a, b, size = (np.bincount(where, v, len(index)) for v in (a, b, size))
    rng, resampled = np.random.default_rng(seed), []
    for _ in range(resamples if len(a) > 1 else 0):
        picked = rng.integers(len(a), size=len(a))
        resampled.append((a[picked].sum() - b[picked].sum()) / size[picked].sum())
    stderr = float(np.std(resampled, ddof=1)) if resampled else math.nan
    return _verdict(float((a.sum() - b.sum()) / size.sum()), stderr, difference)


def _verdict(mean: float, stderr: float, difference: np.ndarray) -> dict[str, float]:
    return {
        "difference": mean,
        "stderr": stderr,
        "low": mean - Z_LEVEL * stderr,
        "high": mean + Z_LEVEL * stderr,
        "p": two_sided(mean, stderr),
        "detectable": detectable(stderr),
        "items": len(difference),
        "above": int((difference > 0).sum()),
        "below": int((difference < 0).sum()),
        "equal": int((difference == 0).sum()),
    }


def compare(results_a: Sequence[Any], results_b: Sequence[Any]) -> list[dict[str, Any]]:
    """One row per task and figure that both have: both values, the paired difference A - B, p and p after Holm.

    Holm's correction is over the main figures of the tasks (`p_holm` of those rows). Raises UserError where the two
    did not answer the same items under the same prompts: names of the missing ids, or what differs.
    """
    others = {result.task: result for result in results_b}
    rows: list[dict[str, Any]] = []
    for a in results_a:
        b = others.get(a.task)
        if b is None:
            continue
        of_b = {row["id"]: row for row in b.rows}
        check_pairs(a, b)
        pairs = [(row, of_b[row["id"]]) for row in a.rows]
        labels = [x.get("cluster") for x, _ in pairs]
        clusters = None if any(label is None for label in labels) else labels
        for name in a.figures:
            if name not in b.figures or not pairs:
                continue
            if name == "bits_per_byte" and "bits" in pairs[0][0]:  # of whole texts: a ratio of sums
                bits_a, bits_b, size = (
                    [float(pair[i][key]) for pair in pairs] for i, key in ((0, "bits"), (1, "bits"), (0, "bytes"))
                )
                verdict = paired_ratio(bits_a, bits_b, size, clusters_N=clusters)
            elif all(name in x and name in y for x, y in pairs):
                verdict = paired([x[name] for x, _ in pairs], [y[name] for _, y in pairs], clusters)
            else:
                continue
            rows.append(
                {
                    "task": a.task,
                    "figure": name,
                    "main": name == a.metric,
                    "a": a.figures[name]["value"],
                    "b": b.figures[name]["value"],
                    **verdict,
                }
            )
    main = [row for row in rows if row["main"]]
    for row, p in zip(main, holm([row["p"] for row in main]), strict=True):
        row["p_holm"] = p
    return rows


def check_pairs(a: Any, b: Any) -> None:
    """Raises UserError where two results of a task hold other items, or items that were asked otherwise."""
    of_a, of_b = ({row["id"]: row for row in result.rows} for result in (a, b))
    for one, other, which in ((of_a, of_b, "second"), (of_b, of_a, "first")):
        if missing := [id_ for id_ in one if id_ not in other]:
            names = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"{a.task}: the {which} model has no result for {len(missing)} items ({names}); evaluate both with the "
                "same --limit, split and seed"
            )
    for id_, row in of_a.items():
        if row.get("asked") != of_b[id_].get("asked"):
            raise UserError(
                f"{a.task}: item {id_} was asked in other words, under another version or other examples; evaluate "
                "both with the same modicum, --shots, --seed and --template"
            )
