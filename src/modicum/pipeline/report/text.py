"""The run in short, for the terminal."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from modicum.budget.units import bytes_text
from modicum.core.files import read_json
from modicum.pipeline.context import Run
from modicum.pipeline.report import gains
from modicum.pipeline.report.ledger import FIELDS, rows


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
    parts = [answers_text(run), ledger_text(run), headline(run), f"report: {run.folder / 'report.html'}"]
    return "\n\n".join(p for p in parts if p)


def headline(run: Run) -> str:
    figures = {name: run.figures(name) for name in read_json(run.folder / "ledger.json")["stages"]}
    lines = [line for line in (gains.lead(figures), *_graded(figures)) if line]
    if "predict" in figures and "pretrain" in figures:
        p, loss = figures["predict"]["prediction"], figures["pretrain"]["heldout_loss"]
        inside = "inside" if p["low"] <= loss <= p["high"] else "OUTSIDE"
        lines.append(
            f"predicted loss {p['mean']:.3f} [{p['low']:.3f}, {p['high']:.3f}], measured {loss:.3f}: "
            f"{inside} the {p['level']:.0%} interval"
        )
    if "evaluate" in figures:
        known = gains.names(figures)
        for v in figures["evaluate"]["variants"]:
            lines.append(
                f"{gains.title(v, known)}: {bytes_text(v['bytes'])}, {v['bits_per_byte']:.3f} bits per byte, "
                f"{v['tokens_per_second']:.0f} tokens/s"
            )
        others = ", ".join(f"{k} {v:.3f}" for k, v in figures["evaluate"]["yardsticks"].items())
        lines.append(f"general-purpose compressors on the same text: {others}")
    return "\n".join(lines)


def _graded(figures: dict[str, Any]) -> list[str]:
    known, found = gains.names(figures), gains.graded(figures)
    return [
        f"{known[role]}, {gains.ARMS[arm]}: exact match {f['exact']['value']:.0%} "
        f"[{f['exact']['low']:.0%}, {f['exact']['high']:.0%}], token F1 {f['f1']['value']:.2f} "
        f"[{f['f1']['low']:.2f}, {f['f1']['high']:.2f}] on {g['questions']} held-out questions"
        for role, g in found.items()
        for arm, f in g["figures"].items()
    ]


def answers_text(run: Run) -> str:
    if not run.done("serve"):
        return ""
    blocks = []
    for answer in run.figures("serve")["answers"]:
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
