"""Measured figures as text: which run counts for a method, and how its result reads."""

from __future__ import annotations

import re
from typing import Any

from modicum.bench import stats
from modicum.bench.record import Record
from modicum.bench.stats import Row, quantity, spread_text
from modicum.core.events import seconds_text
from modicum.core.registry import PortInfo


def rows_of(found: list[Record]) -> dict[str, tuple[Row, list[Record]]]:
    """Per choice: its row in its newest run that holds the baseline too, and that run's records.

    A method with default knobs goes by its key. Choices never measured beside a baseline are left out.
    """
    rows: dict[str, tuple[Row, list[Record]]] = {}
    based = {r.run for r in found if r.choice == r.baseline}
    for choice in dict.fromkeys(r.choice for r in found):
        runs = [r.run for r in found if r.choice == choice and r.run in based]
        if runs:
            members = [r for r in found if r.run == runs[-1]]
            found_rows = [row for part in stats.compare(members) for row in part if row.choice == choice]
            rows[choice] = (found_rows[0], members)
    return rows


def main_run(found: list[Record], info: PortInfo) -> list[Record]:
    """The run that compares most methods with the baseline, the newest of those; empty if there is none."""
    runs: dict[str, list[Record]] = {}
    for entry in found:
        runs.setdefault(entry.run, []).append(entry)
    fit = [r for r in runs.values() if any(e.choice == info.baseline for e in r)]
    return max(fit, key=lambda r: (len({e.choice for e in r}), r[-1].time), default=[])


def of_method(rows: dict[str, tuple[Row, list[Record]]], key: str) -> list[tuple[Row, list[Record]]]:
    """A method's figures, those with default knobs first."""
    own = [found for found in rows.values() if found[0].method == key]
    return sorted(own, key=lambda found: found[0].choice != key)


def measured_text(row: Row) -> str:
    """`bits per byte 2.31 ± 0.01, −3.1% [−5%, −1.2%]; state bytes 12.0 MiB, ×0.5`."""
    quality, cost = row.axes["quality"], row.axes["cost"]
    text = f"{words(quality['metric'])} {spread_text(row.quality, quality['unit'])}"
    if change := change_text(row):
        text += f", {change}"
    text += f"; {words(cost['metric'])} {spread_text(row.cost, cost['unit'])}"
    if not row.is_baseline and row.cost_ratio is not None:
        text += f", ×{row.cost_ratio:.3g}"
    return text


def change_text(row: Row) -> str:
    """The paired difference as a share of the baseline with its interval; "" for the baseline itself."""
    if row.difference is None or not row.quality_ratio:
        return ""
    base = abs(row.quality.mean / row.quality_ratio)
    text = percent(row.difference.mean / base)
    if row.difference.low is not None and row.difference.high is not None:
        text += f" [{percent(row.difference.low / base)}, {percent(row.difference.high / base)}]"
    return text


def percent(share: float) -> str:
    """`+3.1%`, with a true minus sign."""
    if share == 0:
        return "±0%"
    digits = f"{share * 100:+.2g}" if abs(share) < 1 else f"{share * 100:+.0f}"
    return digits.replace("-", "−") + "%"


def setting_text(run: list[Record]) -> str:
    """One paragraph: how, on what and where a run was measured."""
    last = run[-1]
    parts = [
        f"Seeds {', '.join(str(s) for s in sorted({r.seed for r in run}))}",
        "scale " + ", ".join(f"{k}={v}" for k, v in last.scale.items()),
    ]
    if last.budget:
        parts.append("budget " + ", ".join(f"{k}={stats.number(v)}" for k, v in last.budget.items()))
    if last.model:
        parts.append("model " + described(last.model))
    if last.data:
        parts.append("data " + described(last.data))
    parts += [
        f"on {machine_text(last.machine)}",
        f"torch {last.versions.get('torch', '?')}, commit {last.commit}, {last.time[:10]}",
        f"{seconds_text(sum(r.seconds for r in run))} in all",
    ]
    return "; ".join(parts) + "."


def machine_text(machine: dict[str, Any]) -> str:
    cpu = (
        f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads, "
        f"{quantity(machine['memory_bytes'], 'bytes')})"
    )
    return ", ".join([*(machine.get("gpus") or []), cpu])


def described(fields: dict[str, Any]) -> str:
    """Name first, then what else is known of a model or corpus."""
    more = ", ".join(f"{k} {v}" for k, v in fields.items() if k != "name")
    return f"{fields.get('name', '?')}" + (f" ({more})" if more else "")


def words(metric: str) -> str:
    return metric.replace("_", " ")


def cell(text: str) -> str:
    """Text that stays within one cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."
