"""The run in short, for the terminal."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from modicum.core.files import read_json
from modicum.pipeline.context import Run
from modicum.pipeline.report.ledger import FIELDS, rows
from modicum.pipeline.report.parts import reports


def as_json(run: Run) -> str:
    figures = {name: run.figures(name) for name in read_json(run.folder / "ledger.json")["stages"]}
    return json.dumps(
        {
            "run": str(run.folder),
            "report": str(run.folder / "report.html"),
            "ledger": read_json(run.folder / "ledger.json"),
            "figures": figures,
        },
        indent=2,
        ensure_ascii=False,
        default=str,
    )


def as_text(run: Run) -> str:
    made = reports(run)
    lead = next((r.lead for _, r in made if r.lead), "")
    lines = "\n".join([*([lead] if lead else []), *(line for _, r in made for line in r.lines)])
    parts = [*(r.above for _, r in made), ledger_text(run), lines, f"report: {run.folder / 'report.html'}"]
    return "\n\n".join(p for p in parts if p)


def answers_text(answers: Sequence[Mapping[str, Any]]) -> str:
    blocks = []
    for answer in answers:
        text = textwrap.fill(
            " ".join(answer["text"].split()) or "(empty answer)", 100, initial_indent="  ", subsequent_indent="  "
        )
        sources = [
            f"  [{i}]{'*' if i in answer['citations'] else ' '} {s['title']}  {s['source']}"
            for i, s in enumerate(answer["sources"], 1)
        ]
        blocks.append("\n".join([f"Q: {answer['question']}", text, *sources]))
    return "\n\n".join(blocks)


def ledger_text(run: Run) -> str:
    head = ["stage"]
    for name in ("seconds", "peak_bytes", "tokens", "flops"):
        head += [FIELDS[name][0], "measured", "off"]
    table: list[list[Any]] = [head]
    for row in rows(run):
        cells = [row.stage]
        for name in ("seconds", "peak_bytes", "tokens", "flops"):
            entry = row.entries[name]
            cells += [entry.planned_text, entry.measured_text, "" if entry.error is None else f"{entry.error:+.0%}"]
        table.append(cells)
    widths = [max(len(r[i]) for r in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in table
    )
