"""report.html: one self-contained file."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

from modicum import __version__
from modicum.budget.units import bytes_text
from modicum.core.events import count_text, seconds_text
from modicum.core.files import read_json, write_text
from modicum.pipeline.context import Run
from modicum.pipeline.report import plots
from modicum.pipeline.report.ledger import FIELDS, rows
from modicum.pipeline.report.text import headline

HERE = Path(__file__).parent


def write_report(run: Run) -> Path:
    """Write RUN/report.html from what the stages left; needs every stage of the ledger to be finished."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": bytes_text,
        "count": count_text,
        "seconds": seconds_text,
        "percent": lambda x: f"{x:+.0%}",
    }
    ledger = read_json(run.folder / "ledger.json")
    figures: dict[str, Any] = {name: run.figures(name) for name in ledger["stages"]}
    table = rows(run)
    charts = {
        "loss": plots.loss_curve(run) if "pretrain" in figures else None,
        "law": plots.law(run) if "predict" in figures else None,
        "compression": plots.compression(run) if "evaluate" in figures else None,
        "retrieval": plots.retrieval(run) if "ground" in figures else None,
        "ledger": plots.ledger_plot(table),
    }
    html = environment.get_template("page.html").render(
        run=run,
        figures=figures,
        rows=table,
        fields=FIELDS,
        machine=ledger["machine"],
        headline=headline(run),
        recipe=(run.folder / "run.yaml").read_text(encoding="utf-8"),
        version=__version__,
        when=datetime.datetime.now().strftime("%d %B %Y, %H:%M"),
        system=platform.platform(),
        charts={k: v for k, v in charts.items() if v},
        verdict=_verdict(figures),
        plotly=get_plotlyjs(),
        charts_json=json.dumps({k: v for k, v in charts.items() if v}).replace("</", "<\\/"),
    )
    write_text(run.folder / "report.html", html)
    return run.folder / "report.html"


def _verdict(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The four or five numbers a reader wants first; good says whether the run's own aim was met."""
    cards: list[dict[str, Any]] = []
    if "pretrain" in figures:
        p = figures["pretrain"]
        cards.append(
            {
                "label": "model",
                "value": f"{p['parameters'] / 1e6:.2f} M",
                "note": f"parameters, {count_text(p['tokens'])} tokens in {seconds_text(p['seconds'])}",
            }
        )
    if "predict" in figures and "pretrain" in figures:
        q, loss = figures["predict"]["prediction"], figures["pretrain"]["heldout_loss"]
        cards.append(
            {
                "label": "held-out loss",
                "value": f"{loss:.3f}",
                "good": q["low"] <= loss <= q["high"],
                "note": f"predicted {q['mean']:.3f}, between {q['low']:.3f} and {q['high']:.3f}",
            }
        )
    if "evaluate" in figures:
        e = figures["evaluate"]
        best, xz = e["variants"][0], e["yardsticks"].get("xz -9")
        cards.append(
            {
                "label": "bits per byte",
                "value": f"{best['bits_per_byte']:.3f}",
                "good": xz is not None and best["bits_per_byte"] < xz,
                "note": f"xz -9 needs {xz:.3f} for the same text" if xz else "",
            }
        )
        smallest = min(e["variants"], key=lambda v: v["bytes"])
        cards.append(
            {
                "label": "smallest model",
                "value": bytes_text(smallest["bytes"]),
                "note": f"{smallest['name']}, {smallest['bits_per_byte']:.3f} bits per byte, "
                f"{best['bytes'] / smallest['bytes']:.1f}× smaller",
            }
        )
    if "ground" in figures:
        by_mode = figures["ground"]["metrics"].get("withheld") or next(iter(figures["ground"]["metrics"].values()))
        mode = max(by_mode, key=lambda m: by_mode[m]["mrr"])
        cards.append(
            {
                "label": "search, MRR@10",
                "value": f"{by_mode[mode]['mrr']:.2f}",
                "note": f"best: {mode}; the query sentence is taken out of the text searched",
            }
        )
    return cards
