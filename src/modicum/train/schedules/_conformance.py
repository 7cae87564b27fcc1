"""What must hold for any schedule."""

from __future__ import annotations

import math

from modicum.core import registry
from modicum.train.schedules import Schedule


def _make(key: str) -> Schedule:
    loaded = registry.load("schedule", key)
    return loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())


def check_finite_everywhere(key: str) -> None:
    """For horizons from one token up, every scale is a finite number that is not negative."""
    schedule = _make(key)
    for total in (1, 7, 1000, 10**9, 3 * 10**12):
        for part in range(101):
            scales = schedule.scale(total * part / 100, total)
            assert "lr" in scales, f"{key}: scale() must give 'lr', gave {sorted(scales)}"
            for name, value in scales.items():
                assert isinstance(value, int | float) and math.isfinite(value) and value >= 0, (
                    f"{key}: {name}={value} at {part}% of {total}"
                )


def check_pure(key: str) -> None:
    """The same arguments give the same scales, in any order and from another instance."""
    first, second = _make(key), _make(key)
    points = [i * 1e6 / 37 for i in range(38)]
    forward = [first.scale(p, 1e6) for p in points]
    backward = [second.scale(p, 1e6) for p in reversed(points)][::-1]
    assert forward == backward, f"{key}: scale() depends on more than its arguments"


def check_trains(key: str) -> None:
    """The rate is positive in the middle of every step of a short run, and not above its peak."""
    schedule = _make(key)
    rates = [schedule.scale(i + 0.5, 20)["lr"] for i in range(20)]
    assert all(r > 0 for r in rates), f"{key}: a step has rate zero: {rates}"
    assert 0.5 <= max(rates) <= 1.0 + 1e-9, f"{key}: the peak rate is {max(rates)} of the one asked for"
