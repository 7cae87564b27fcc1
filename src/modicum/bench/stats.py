"""Comparing methods over seeds: mean, spread, and paired differences with a confidence interval.

Methods are compared seed by seed (same seed, same data order, same start), which removes what the seeds
share. With n paired differences d, the interval is Student's: mean(d) +- t(n-1, 97.5%) * std(d) / sqrt(n).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from modicum.bench.record import Record

TIMES = ("s", "ms", "1/s", "MB/s", "tokens/s")  # units whose figures belong to a machine


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None with one value) of n values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return number(self.mean) + (f" ± {number(self.std)}" if self.std is not None else "")


@dataclass(frozen=True)
class Difference:
    """Paired difference method minus baseline; low and high bound its mean at 95% (None with one pair)."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def clear(self) -> bool:
        """The interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Row:
    """One method of a comparison."""

    method: str
    choice: str
    is_baseline: bool
    axes: dict[str, dict[str, str]]
    quality: Spread
    cost: Spread
    seconds: Spread
    quality_ratio: float | None  # mean over the baseline's mean
    cost_ratio: float | None
    difference: Difference | None  # of the quality metric
    better: bool | None  # clearly better (True), clearly worse (False), not told apart (None)
    metrics: dict[str, Spread]
    seeds: list[int]
    claim: dict[str, Any]
    tier: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired(method: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Difference over the seeds both have; None if they share none."""
    seeds = sorted(method.keys() & baseline.keys())
    differences = [method[s] - baseline[s] for s in seeds]
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Difference(mean, None, None, 1)
    half = student_975(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


# Importing scipy.stats for one quantile would take longer than everything else `modicum ls` does.
STUDENT_975 = (
    12.7062047, 4.3026527, 3.1824463, 2.7764451, 2.5705818,
    2.4469118, 2.3646243, 2.3060041, 2.2621572, 2.2281389,
)  # fmt: skip


def student_975(freedom: int) -> float:
    """The 97.5% quantile of Student's t: tabulated to ten degrees of freedom, then expanded about the
    normal's (Abramowitz and Stegun, 26.7.5), to 1e-4."""
    if freedom <= len(STUDENT_975):
        return STUDENT_975[freedom - 1]
    x = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
    )
    return x + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def facets(records: list[Record]) -> list[list[Record]]:
    """Records of one lab parted by the axes they are judged on, each part with the baseline beside it.

    Most ports have one pair of axes; where a port's methods save different things (an adapter trainable
    parameters, a quantiser stored bytes), the baseline stands in every part. Not beside a method with a measurement
    of its own, in a metric that the baseline's has not: that one brings its own baseline.
    """
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(repr(record.axes), []).append(record)
    if len(parts) < 2:
        return list(parts.values())
    base = [r for r in records if r.choice == r.baseline]
    others = [[r for r in part if r.choice != r.baseline] for part in parts.values()]
    return [
        [dataclasses.replace(b, axes=part[0].axes) for b in base if b.has(part[0].axes["quality"]["metric"])] + part
        for part in others
        if part
    ]


def compare(records: list[Record]) -> list[list[Row]]:
    """Rows for records of one lab, parted by `facets`; the baseline first, then in order of measurement."""
    if len({r.lab.id for r in records}) > 1:
        raise ValueError("records of several labs are not to be compared; see figures.comparisons")
    return [_rows(part) for part in facets(records)]


def _rows(records: list[Record]) -> list[Row]:
    axes, baseline = records[-1].axes, records[-1].baseline
    quality, cost, better = axes["quality"]["metric"], axes["cost"]["metric"], axes["quality"]["better"]
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.choice, []).append(record)
    base = groups.get(baseline) or next((g for g in groups.values() if g[0].method == baseline), None)
    rows = []
    for choice, group in groups.items():
        is_baseline = group is base
        difference = None
        if base and not is_baseline and _same_clock(group, base, axes["quality"]):
            difference = paired({r.seed: r.value(quality) for r in group}, {r.seed: r.value(quality) for r in base})
        names = [n for n in group[0].metrics if all(n in r.metrics for r in group)]
        spread = {n: Spread.of([r.value(n) for r in group]) for n in (*names, "seconds", "peak_bytes", "flops")}
        rows.append(
            Row(
                group[0].method,
                choice,
                is_baseline,
                axes,
                spread[quality],
                spread[cost],
                spread["seconds"],
                _ratio(spread[quality], base, quality) if _same_clock(group, base, axes["quality"]) else None,
                _ratio(spread[cost], base, cost) if _same_clock(group, base, axes["cost"]) else None,
                difference,
                ((difference.mean < 0) == (better == "lower")) if difference and difference.clear else None,
                spread,
                sorted(r.seed for r in group),
                group[-1].claim,
                group[-1].lab.tier,
            )
        )
    return sorted(rows, key=lambda row: not row.is_baseline)


def _same_clock(group: list[Record], base: list[Record] | None, axis: dict[str, str]) -> bool:
    """Whether an axis may be compared: times only where one machine took them all, other figures unless it says not."""
    if not axis.get("against", "baseline"):
        return False
    timed = axis["unit"] in TIMES or axis["metric"] == "seconds"
    machines = {json.dumps(r.machine, sort_keys=True) for r in (*group, *(base or []))}
    return not timed or len(machines) == 1


def _ratio(spread: Spread, base: list[Record] | None, name: str) -> float | None:
    if not base:
        return None
    mean = statistics.fmean(r.value(name) for r in base)
    return spread.mean / mean if mean else None


def number(value: float) -> str:
    """Four significant digits, with k/M/G for large counts."""
    if not math.isfinite(value):
        return str(value)
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.4g}{suffix}"
    return f"{value:.4g}"


def quantity(value: float | None, unit: str) -> str:
    """A value in its unit: bytes as KiB/MiB, seconds as s, shares as given."""
    if value is None:
        return "—"
    if unit == "bytes":
        from modicum.budget.units import bytes_text

        return bytes_text(value)
    return f"{number(value)} {unit}".rstrip()


def spread_text(spread: Spread, unit: str) -> str:
    """`2.310 ± 0.012 bits/byte`; the spread is left out with one seed."""
    if unit == "bytes":
        return quantity(spread.mean, unit)
    more = f" ± {spread.std:.2g}" if spread.std else ""  # counts do not vary
    return f"{number(spread.mean)}{more} {unit}".rstrip()
