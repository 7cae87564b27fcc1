"""What a bench is asked for and what it gives back: the words between a bench's file and the harness.

They stand by themselves, so that a change of the harness, the records or the pages makes no measurement stale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modicum.budget import Budget, Cost


@dataclass(frozen=True)
class Axis:
    """A metric (or seconds, peak_bytes, flops), which way is better, and its unit.

    against: what the figure is compared with; "" where every method asks a question of its own (tasks).
    """

    metric: str
    better: str = "lower"
    unit: str = ""
    against: str = "baseline"


@dataclass(frozen=True, kw_only=True)
class Axes:
    quality: Axis
    cost: Axis


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the person asked for. `data` and `model` are paths or names; None is the bench's own small one."""

    scale: Any
    budget: Budget = field(default_factory=Budget)
    data: str | None = None
    model: str | None = None
    device: str = "cpu"
    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one run of one method gave.

    metrics holds the axes' metrics and any other number worth keeping. `cost` may leave seconds and
    peak_bytes at zero: the harness then puts in what its own meter saw around the whole call.
    `model` holds name, shape, parameters and checksum; `data` name, bytes and checksum. `axes`, if given,
    replace the bench's: where the settings decide what can be judged.
    """

    metrics: dict[str, float]
    cost: Cost = field(default_factory=Cost)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    axes: Axes | None = None
