"""The limits a run must keep, and the deadline that stops it cleanly."""

from __future__ import annotations

import time
from dataclasses import dataclass

from modicum.budget import units
from modicum.budget.cost import Cost
from modicum.core.errors import BudgetError, UserError

LIMITS = {"time": "seconds", "memory": "bytes", "disk": "bytes", "tokens": "tokens", "flops": "flops"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """None means no limit. `Budget.parse` reads quantities with units."""

    seconds: float | None = None
    memory_bytes: float | None = None
    disk_bytes: float | None = None
    tokens: float | None = None
    flops: float | None = None

    @classmethod
    def parse(cls, text: str | None = None, **limits: str | int | float | None) -> Budget:
        """From `"10m,2GiB,50Mtok"` (a size alone means memory) or keywords of `LIMITS`."""
        values: dict[str, float] = {}
        for part in (text or "").split(","):
            if not part.strip():
                continue
            quantity = units.kind_of(part)
            if quantity is None or quantity[0] == "number":
                raise UserError(f"{part.strip()!r} is not a budget; write {'; '.join(units.KINDS.values())}")
            values[{"bytes": "memory_bytes"}.get(quantity[0], quantity[0])] = quantity[1]
        for name, value in limits.items():
            if name not in LIMITS:
                raise UserError(f"unknown limit {name!r}. Allowed: {', '.join(LIMITS)}")
            if value is not None:
                field = {"time": "seconds", "memory": "memory_bytes", "disk": "disk_bytes"}.get(name, name)
                values[field] = units.parse(value, LIMITS[name])
        return cls(**values)

    def require(self, cost: Cost, what: str) -> None:
        """Raise `BudgetError` with the arithmetic if `cost` does not fit."""
        for name, need, limit, text in (
            ("memory", cost.peak_bytes, self.memory_bytes, units.bytes_text),
            ("disk", cost.disk_bytes, self.disk_bytes, units.bytes_text),
            ("time", cost.seconds, self.seconds, lambda s: f"{s:.0f} s"),
            ("tokens", cost.tokens, self.tokens, lambda n: f"{n:.3g}"),
            ("flops", cost.flops, self.flops, lambda n: f"{n:.3g}"),
        ):
            if limit is not None and need > limit:
                raise BudgetError(
                    f"{what} needs {text(need)} of {name}, the budget is {text(limit)} "
                    f"({text(need - limit)} too much); raise budget.{name} or ask for less"
                )


class Deadline:
    """A point in time after which work stops at its next safe point."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()

    @property
    def passed(self) -> bool:
        return self.left <= 0
