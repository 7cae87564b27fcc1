"""report.html: one self-contained file. A stage's block is the template beside its file; low ranks come first."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from modicum import __version__
from modicum.budget.units import bytes_text
from modicum.core.events import count_text, seconds_text
from modicum.core.files import read_json, write_text
from modicum.pipeline.context import Run
from modicum.pipeline.report import gains, plots
from modicum.pipeline.report.ledger import FIELDS, rows
from modicum.pipeline.report.parts import reports
from modicum.pipeline.stage import Finished, Report

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
BELOW = 100  # the rank from which on blocks stand below the ledger


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
    table = rows(run)
    made = reports(run)
    charts = {f"{done.name}-{name}": chart for done, r in made for name, chart in r.charts.items() if chart}
    blocks = [(done, _block(environment, done, r), r.rank) for done, r in made if done.block]
    html = environment.get_template("page.html").render(
        run=run,
        rows=table,
        fields=FIELDS,
        first=[(done.name, text) for done, text, rank in blocks if rank < BELOW],
        below=[(done.name, text) for done, text, rank in blocks if rank >= BELOW],
        lead=next((r.lead for _, r in made if r.lead), ""),
        machine=ledger["machine"],
        recipe=(run.folder / "run.yaml").read_text(encoding="utf-8"),
        version=__version__,
        when=datetime.datetime.now().strftime("%d %B %Y, %H:%M"),
        system=platform.platform(),
        verdict=[card for _, r in made for card in r.cards] + gains.planned(table),
        plotly=get_plotlyjs(),
        charts_json=json.dumps(charts | {"ledger": plots.ledger_plot(table)}).replace("</", "<\\/"),
    )
    write_text(run.folder / "report.html", html)
    return run.folder / "report.html"


def _block(environment: Environment, done: Finished, report: Report) -> str:
    """A stage's block: its template with its name, section and figures."""
    assert done.block
    template = environment.from_string(done.block.read_text(encoding="utf-8"))
    suffix = "" if done.name == done.key else f", {done.name}"
    return template.render(name=done.name, suffix=suffix, section=done.section, figures=done.figures, **report.values)
