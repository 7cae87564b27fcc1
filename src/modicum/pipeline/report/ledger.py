"""Planned against measured, as rows for every kind of output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modicum.budget.units import bytes_text
from modicum.core.events import count_text, seconds_text
from modicum.core.files import read_json
from modicum.pipeline.context import Run

FIELDS = {
    "seconds": ("time", seconds_text),
    "peak_bytes": ("peak memory", bytes_text),
    "tokens": ("tokens", count_text),
    "flops": ("FLOPs", count_text),
    "disk_bytes": ("disk", bytes_text),
}


@dataclass(frozen=True)
class Entry:
    planned: float
    measured: float
    planned_text: str
    measured_text: str

    @property
    def error(self) -> float | None:
        """Measured over planned, minus one; None where nothing was planned or measured."""
        return self.measured / self.planned - 1 if self.planned and self.measured else None


@dataclass(frozen=True)
class Row:
    stage: str
    entries: dict[str, Entry]


def rows(run: Run) -> list[Row]:
    ledger = read_json(run.folder / "ledger.json")["stages"]
    made = [Row(name, {f: _entry(f, r["planned"], r["measured"]) for f in FIELDS}) for name, r in ledger.items()]
    total_planned = {"seconds": sum(r["planned"].get("seconds", 0) for r in ledger.values())}
    total_measured = {"seconds": sum(r["measured"].get("seconds", 0) for r in ledger.values())}
    for totals, side in ((total_planned, "planned"), (total_measured, "measured")):
        totals["peak_bytes"] = max(r[side].get("peak_bytes", 0) for r in ledger.values())
        for name in ("tokens", "flops", "disk_bytes"):
            totals[name] = sum(r[side].get(name, 0) for r in ledger.values())
    return [*made, Row("whole run", {f: _entry(f, total_planned, total_measured) for f in FIELDS})]


def _entry(name: str, planned: dict[str, Any], measured: dict[str, Any]) -> Entry:
    text = FIELDS[name][1]
    p, m = float(planned.get(name) or 0), float(measured.get(name) or 0)
    return Entry(p, m, text(p) if p else "–", text(m) if m else "–")
