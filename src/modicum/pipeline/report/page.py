"""report.html: one self-contained file. A stage's block is `blocks/STAGE.html`; what was gained comes first."""

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
from modicum.pipeline.recipe import load
from modicum.pipeline.report import gains, plots
from modicum.pipeline.report.ledger import FIELDS, rows

HERE = Path(__file__).parent
FIRST = ("evaluate", "serve", "adapt")  # blocks before the ledger, in this order; the others follow the stages


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
    charts = {name: chart for name, chart in _charts(run, figures, table).items() if chart}
    names = gains.names(figures)
    titles = (
        {v["name"]: gains.title(v, names) for v in figures["evaluate"]["variants"]} if "evaluate" in figures else {}
    )
    blocks = [n for n in FIRST if n in figures] + [
        n for n in figures if n not in FIRST and (HERE / _block(n)).is_file()
    ]
    html = environment.get_template("page.html").render(
        run=run,
        figures=figures,
        settings=load(run.folder / "run.yaml"),
        rows=table,
        fields=FIELDS,
        blocks=blocks,
        first=FIRST,
        names=names,
        titles=titles,
        arms=gains.ARMS,
        lead=gains.lead(figures),
        machine=ledger["machine"],
        recipe=(run.folder / "run.yaml").read_text(encoding="utf-8"),
        version=__version__,
        when=datetime.datetime.now().strftime("%d %B %Y, %H:%M"),
        system=platform.platform(),
        verdict=gains.cards(figures, table),
        plotly=get_plotlyjs(),
        charts_json=json.dumps(charts).replace("</", "<\\/"),
    )
    write_text(run.folder / "report.html", html)
    return run.folder / "report.html"


def _block(stage: str) -> str:
    return f"blocks/{stage}.html"


def _charts(run: Run, figures: dict[str, Any], table: list[Any]) -> dict[str, Any]:
    return {
        "graded": plots.graded(figures, gains.names(figures)) if "evaluate" in figures else None,
        "adapt": plots.adapting(run) if "adapt" in figures else None,
        "loss": plots.loss_curve(run) if "pretrain" in figures else None,
        "law": plots.law(run) if "predict" in figures else None,
        "compression": plots.compression(run) if "evaluate" in figures else None,
        "retrieval": plots.retrieval(run) if "ground" in figures else None,
        "ledger": plots.ledger_plot(table),
    }
