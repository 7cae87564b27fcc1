"""Measured figures as text: which labs are shown, and how a method's result in one of them reads."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from modicum.bench import labs, stats
from modicum.bench.card import Card, claim_text, not_measurable
from modicum.bench.record import Record
from modicum.bench.stats import Row, quantity, spread_text
from modicum.core.events import seconds_text

WIDTH = 160  # of a line that `screen` prints
KNOBS, MEASURED = 10, 6  # lines of a screen for knobs and for settings measured
RUNS = "shows that it runs"  # what a measurement of tier smoke says, and all it says


def comparisons(records: list[Record]) -> list[list[Record]]:
    """Records lab by lab, those that hold the baseline: the highest tier first, in it the newest.

    A lab gives way to a newer one of the same settings (the bench's source apart) that holds all of its choices.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.lab.id, []).append(record)
    based = [g for g in groups.values() if any(r.choice == r.baseline for r in g)]
    based.sort(key=lambda g: (labs.TIERS.index(g[0].lab.tier), g[-1].time), reverse=True)
    kept: list[list[Record]] = []
    for group in based:
        newer = [k for k in kept if k[0].lab.settings == group[0].lab.settings]
        if not any({r.choice for r in group} <= {r.choice for r in k} for k in newer):
            kept.append(group)
    return kept


def of_method(records: list[Record], key: str) -> list[tuple[list[Record], list[Row]]]:
    """Each lab's records and the rows of one method in them; labs without the method are left out."""
    tables = [(group, [row for part in stats.compare(group) for row in part]) for group in comparisons(records)]
    own = [(group, [row for row in rows if row.method == key]) for group, rows in tables]
    return [(group, rows) for group, rows in own if rows]


def verdict(row: Row) -> str:
    """What a row says of its method: of its claim, where that is in numbers, else against the baseline.

    A measurement of tier smoke says nothing but that it runs; nor does one whose baseline cannot do the task.
    """
    if row.tier == "smoke":
        return RUNS
    if not row.axes["quality"].get("against", "baseline"):
        able = row.quality.mean > 0
        return (
            "the model can do some of it" if able else f"not measurable here: {words(row.axes['quality']['metric'])} 0"
        )
    if row.is_baseline:
        return "baseline"
    if row.difference is None:
        return "not compared"
    if row.quality_ratio is None:  # a mean of 0 has no ratio
        return f"not measurable here: the baseline's {words(row.axes['quality']['metric'])} is 0"
    if row.difference.low == row.difference.high == 0:
        return "the same as the baseline"
    if "change" not in row.claim and "cost_ratio" not in row.claim:
        return {True: "better", False: "worse", None: "not told apart"}[row.better]
    met = row.better is not False or "change" in row.claim
    if "change" in row.claim:
        change = row.difference.mean / abs(row.quality.mean / row.quality_ratio)
        met = (
            change >= row.claim["change"]
            if row.axes["quality"]["better"] == "higher"
            else change <= row.claim["change"]
        )
    if "cost_ratio" in row.claim and met:
        wanted, ratio = row.claim["cost_ratio"], row.cost_ratio
        met = ratio is not None and (ratio >= wanted if row.axes["cost"]["better"] == "higher" else ratio <= wanted)
    return "claim met" if met else "claim missed"


def measured_text(row: Row) -> str:
    """`bits per byte 2.31 ± 0.01, −3.1% [−5%, −1.2%]; state bytes 12.0 MiB, ×0.5; better`."""
    quality, cost = row.axes["quality"], row.axes["cost"]
    text = f"{words(quality['metric'])} {spread_text(row.quality, quality['unit'])}"
    if change := change_text(row):
        text += f", {change}"
    unit = "" if cost["unit"] == cost["metric"] else cost["unit"]
    text += f"; {words(cost['metric'])} {spread_text(row.cost, unit)}"
    if ratio := ratio_text(row):
        text += f", {ratio}"
    return f"{text}; {verdict(row)}"


def screen(card: Card, comparisons_of_method: list[tuple[list[Record], list[Row]]], most: int = 40) -> list[str]:
    """A method on one screen of at most `most` lines: card, knobs, capabilities, claim, what was measured, where it is.

    The card gives way first: its equation and its first words stay, the rest is in the file that the last line names.
    """
    port, key = card.info.port, card.info.key
    width = max((len(k.name) for k in card.knobs), default=0)
    knobs = [
        _short(
            f"  {k.name:<{width}}  {k.type}{' = ' + k.default if k.default else '  (required)'}"
            + (f"    {k.note}" if k.note else "")
        )
        for k in card.knobs
    ]
    if len(knobs) > KNOBS:
        knobs = [*knobs[: KNOBS - 1], f"  and {len(knobs) - KNOBS + 1} more: modicum show {port} {key} --json"]
    tail = [f"{name:<9} {', '.join(words)}" for name, words in card.capabilities.items() if words]
    if card.claim:
        tail.append(_short(f"claim     {claim_text(card.claim)}"))
    measured = []
    if comparisons_of_method:  # the highest tier and in it the newest lab; the page has the others
        group, rows = comparisons_of_method[0]
        measured = [_short(f"{row.choice}: {measured_text(row)}", WIDTH - 10) for row in rows[:MEASURED]]
        seeds = ", ".join(str(s) for s in sorted({r.seed for r in group}))
        model = common([r.model for r in group]).get("name") or group[0].lab.inputs.get("model", {}).get("name", "")
        measured.append(
            f"tier {group[0].lab.tier}, seeds {seeds}{', ' + model if model else ''}; docs/methods/{port}.md has it all"
        )
    elif reason := not_measurable(card.info):
        measured = textwrap.wrap(f"not measurable here: {reason}", WIDTH - 10)
    else:
        measured = [f"nothing yet; type: modicum bench {port} {key}"]
    tail += [("measured  " if i == 0 else " " * 10) + line for i, line in enumerate(measured)]
    tail.append(f"file      {card.path}")
    body = card.text.splitlines()
    left = most - len(tail) - (len(knobs) + 1 if knobs else 0) - 1
    if len(body) > left:
        body = [*body[: left - 1], "  ... the rest of the card is in the file"]
    return [*body, "", *([*knobs, ""] if knobs else []), *tail]


def _short(line: str, width: int = WIDTH) -> str:
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."


def ratio_text(row: Row) -> str:
    """The cost over the baseline's; "" for the baseline and where the tier says nothing."""
    known = row.cost_ratio is not None and not row.is_baseline and row.tier != "smoke"
    return f"×{row.cost_ratio:.3g}" if known else ""


def change_text(row: Row) -> str:
    """The paired difference as a share of the baseline with its interval; "" for the baseline and for tier smoke."""
    if row.difference is None or not row.quality_ratio or row.tier == "smoke":
        return ""
    base = abs(row.quality.mean / row.quality_ratio)
    text = percent(row.difference.mean / base)
    if row.difference.low is not None and row.difference.high is not None:
        text += f" [{percent(row.difference.low / base)}, {percent(row.difference.high / base)}]"
    return text


def percent(fraction: float) -> str:
    """`+3.1%`, with a true minus sign."""
    if fraction == 0:
        return "±0%"
    digits = f"{fraction * 100:+.2g}" if abs(fraction) < 1 else f"{fraction * 100:+.0f}"
    return digits.replace("-", "−") + "%"


def setting_text(group: list[Record]) -> str:
    """One paragraph: at what tier, how, on what and where the records of a lab were measured."""
    lab = group[0].lab
    parts = [
        f"Tier {lab.tier}" + (f" ({RUNS})" if lab.tier == "smoke" else ""),
        f"seeds {', '.join(str(s) for s in sorted({r.seed for r in group}))}",
        "scale " + ", ".join(f"{k}={v}" for k, v in lab.scale.items()),
    ]
    if lab.budget:
        parts.append("budget " + ", ".join(f"{k}={stats.number(v)}" for k, v in lab.budget.items()))
    for name in ("model", "data"):
        if fields := common([getattr(r, name) for r in group]):
            parts.append(f"{name} {described(fields)}")
    parts += [f"on {text}" for text in dict.fromkeys(machine_text(r.machine) for r in group)]
    commits = ", ".join(dict.fromkeys(r.commit for r in group))
    parts += [
        f"torch {', '.join(dict.fromkeys(r.versions.get('torch', '?') for r in group))}, commit {commits}, "
        f"{group[-1].time[:10]}",
        f"{seconds_text(sum(r.seconds for r in group))} in all",
    ]
    return "; ".join(parts) + "."


def common(values: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all of `values` hold."""
    return {k: v for k, v in values[0].items() if all(k in other and other[k] == v for other in values)}


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
