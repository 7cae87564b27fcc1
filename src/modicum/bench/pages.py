"""The pages of docs/methods: one per port, from its methods' cards and its evidence."""

from __future__ import annotations

from pathlib import Path

from modicum.bench import plots, record, stats
from modicum.bench.card import Card, claim_text, not_measurable, read_card
from modicum.bench.figures import (
    cell,
    change_text,
    comparisons,
    ratio_text,
    sentence,
    setting_text,
    verdict,
    words,
)
from modicum.bench.stats import Row, spread_text
from modicum.core import registry
from modicum.core.registry import PortInfo

NOTE = "<!-- Written by `modicum catalogue`; edit the methods' files, not this. -->"
SOURCE = registry.ROOT.parents[1]


def own_methods(port: str) -> dict[str, Card]:
    """Cards of the methods that ship with modicum, the baseline first; plug-ins are left out."""
    return {k: read_card(i) for k, i in registry.methods(port).items() if i.path is not None}


def port_files(info: PortInfo, folder: Path, evidence: Path) -> dict[Path, str]:
    """A port's page, and its plot if there is evidence."""
    cards = own_methods(info.name)
    lines = [
        NOTE,
        "",
        f"# Port {info.name}",
        "",
        f"{sentence(info.summary)} Room [{info.package_name}](../{info.package_name}.md); baseline `{info.baseline}`.",
        "",
        "```sh",
        f"modicum ls {info.name}",
        f"modicum show {info.name} {info.baseline}",
        f"modicum bench {info.name}",
        f"modicum check {info.name}",
        f"modicum new {info.name} my-method",
        "```",
        "",
        f"What it asks of a method: [`{_source(info)}`](../../{_source(info)}).",
        "",
        "## Measured",
        "",
    ]
    measured, pictures = _measured(info, evidence)
    lines += [*measured, "## Methods", ""]
    for key, card in cards.items():
        lines += [f"### {key}" + (" (baseline)" if key == info.baseline else ""), "", *_card(card)]
    files = {folder / f"{info.name}.md": "\n".join(lines).rstrip() + "\n"}
    return files | {folder / "plots" / name: svg for name, svg in pictures.items()}


def _source(info: PortInfo) -> str:
    path = info.path / "__init__.py"
    return path.relative_to(SOURCE).as_posix() if path.is_relative_to(SOURCE) else path.name


def _measured(info: PortInfo, evidence: Path) -> tuple[list[str], dict[str, str]]:
    """Lines of the section, a table for each lab, and the SVG of each plot by its file's name.

    What is of tier smoke has no plot: points side by side would be read as a comparison.
    """
    lines: list[str] = []
    pictures: dict[str, str] = {}
    for group in comparisons(record.read(evidence, info.name)):
        lines += [setting_text(group), ""]
        for rows in stats.compare(group):
            if rows[0].tier != "smoke":
                name = f"{info.name}-{len(pictures) + 1}.svg" if pictures else f"{info.name}.svg"
                pictures[name] = plots.svg(info.name, rows)
                title = f"{words(rows[0].axes['quality']['metric'])} against {words(rows[0].axes['cost']['metric'])}"
                lines += [f"![{title}](plots/{name})", ""]
            lines += [*_table(rows), ""]
    return lines or [f"Nothing yet; type `modicum bench {info.name}`.", ""], pictures


def _table(rows: list[Row]) -> list[str]:
    quality, cost = rows[0].axes["quality"], rows[0].axes["cost"]
    smoke = rows[0].tier == "smoke"
    shown = (quality["metric"], cost["metric"], "peak_bytes", "flops")
    names = [n for n in rows[0].metrics if n not in shown]
    heads = ["method", words(quality["metric"]), words(cost["metric"]), *(words(n) for n in names), "result"]
    if not smoke:
        heads[2:3] = ["change [95%]", words(cost["metric"]), "cost ratio"]
        heads.append("claim")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        more = [
            spread_text(row.metrics[n], "bytes" if n.endswith("_bytes") else "") if n in row.metrics else "—"
            for n in names
        ]
        cells = [
            f"**{row.choice}**" if row.is_baseline else row.choice,
            spread_text(row.quality, quality["unit"]),
            *([] if smoke else [change_text(row) or "—"]),
            spread_text(row.cost, cost["unit"]),
            *([] if smoke else [ratio_text(row) or "—"]),
            *more,
            verdict(row),
            *([] if smoke else [cell(claim_text(row.claim)) or "—"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _card(card: Card) -> list[str]:
    body = card.text.partition("\n\n")[2].rstrip()
    file = card.path.relative_to(SOURCE).as_posix() if card.path.is_relative_to(SOURCE) else card.path.name
    lines = [sentence(card.summary), "", *([body, ""] if body else [])]
    if card.knobs:
        lines += ["| knob | type | default | |", "| --- | --- | --- | --- |"]
        for knob in card.knobs:
            default = f"`{cell(knob.default)}`" if knob.default else "required"
            lines.append(f"| `{knob.name}` | `{cell(knob.type)}` | {default} | {cell(knob.note)} |")
        lines.append("")
    words = {name: ", ".join(f"`{w}`" for w in words) for name, words in card.capabilities.items() if words}
    if words:
        lines += ["; ".join(f"{name} {text}" for name, text in words.items()).capitalize() + ".", ""]
    if card.claim:
        lines += [f"Claim: {claim_text(card.claim)}.", ""]
    if reason := not_measurable(card.info):
        lines += [f"Not measurable here: {reason}.", ""]
    return [*lines, f"[`{file}`](../../{file})", ""]


def index() -> str:
    """docs/methods/README.md."""
    lines = [
        NOTE,
        "",
        "# Ports",
        "",
        "A port is a protocol, a conformance suite and a bench; a method is one file behind it. "
        "[index.html](index.html), opened in a browser, filters and sorts all methods by what was measured.",
        "",
        "| port | room | what it is | baseline | methods |",
        "| --- | --- | --- | --- | --- |",
    ]
    for info in registry.ports().values():
        lines.append(
            f"| [{info.name}]({info.name}.md) | [{info.package_name}](../{info.package_name}.md) | "
            f"{cell(info.summary)} | {info.baseline} | {', '.join(own_methods(info.name))} |"
        )
    return "\n".join(lines) + "\n"
