"""docs/methods/index.html: every method with what was measured of it, one page to filter and sort, complete in itself.

`overview.html` beside this file is the page; the rows are put into it as JSON. Nothing is fetched: it opens from disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modicum.bench import labs, record, stats
from modicum.bench.card import Card, claim_text, not_measurable, read_card
from modicum.bench.figures import change_text, comparisons, ratio_text, sentence, verdict, words
from modicum.bench.stats import Row, spread_text
from modicum.core import registry
from modicum.core.registry import PortInfo

PAGE = Path(__file__).with_name("overview.html")
MARK = "/*ROWS*/[]"
VERDICTS = (  # what the page filters by, by how a verdict begins
    ("claim met", "claim met"),
    ("claim missed", "claim missed"),
    ("better", "better"),
    ("worse", "worse"),
    ("not told apart", "not told apart"),
    ("the same", "not told apart"),
    ("baseline", "baseline"),
    ("not measurable", "not measurable here"),
    ("measured", "measured, not compared"),
    ("not compared", "measured, not compared"),
    ("shows", "runs"),
)


def page(evidence: Path) -> str:
    """The page's HTML, the same for the same registry and records."""
    rows = [row for info in registry.ports().values() for row in rows_of(info, evidence)]
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return PAGE.read_text(encoding="utf-8").replace(MARK, text.replace("},{", "},\n{"))


def rows_of(info: PortInfo, evidence: Path) -> list[dict[str, Any]]:
    """A row for each setting of each method that ships with modicum, from the highest tier it was measured at."""
    cards = {k: read_card(i) for k, i in registry.methods(info.name).items() if i.path is not None}
    measured: dict[str, dict[str, Row]] = {}
    for group in comparisons(record.read(evidence, info.name)):  # the highest tier first, in it the newest
        for row in (row for part in stats.compare(group) for row in part):
            have = measured.setdefault(row.method, {})
            top = max((labs.TIERS.index(r.tier) for r in have.values()), default=-1)
            if labs.TIERS.index(row.tier) >= top:
                have.setdefault(row.choice, row)
    rows = []
    for key, card in cards.items():
        about = _about(info, key, card)
        if key in measured:
            rows += [about | _figures(row) for row in measured[key].values()]
        elif reason := not_measurable(registry.methods(info.name)[key]):
            rows.append(about | {"verdict": "not measurable here", "why": reason})
        else:
            rows.append(about | {"verdict": "not measured yet"})
    return rows


def _about(info: PortInfo, key: str, card: Card) -> dict[str, Any]:
    return {
        "port": info.name,
        "key": key,
        "choice": key,
        "what": sentence(card.summary).replace("`", ""),
        "claim": claim_text(card.claim),
        "paper": list(card.paper) if card.paper else [],
        "tier": "",
        "seeds": 0,
    }


def _figures(row: Row) -> dict[str, Any]:
    """Tier smoke shows that it runs: no figure of it is printed."""
    quality, cost = row.axes["quality"], row.axes["cost"]
    outcome = verdict(row)
    cells: dict[str, Any] = {"choice": row.choice, "tier": row.tier, "seeds": len(row.seeds)}
    cells["verdict"] = next((name for start, name in VERDICTS if outcome.startswith(start)), outcome)
    if row.tier == "smoke":
        return cells
    if outcome != cells["verdict"]:
        cells["why"] = outcome
    cells["quality"] = f"{words(quality['metric'])} {spread_text(row.quality, quality['unit'])}"
    cells["cost"] = f"{words(cost['metric'])} {spread_text(row.cost, cost['unit'])}"
    if change := change_text(row):
        cells["change"] = change
        assert row.difference is not None and row.quality_ratio is not None
        relative = row.difference.mean / abs(row.quality.mean / row.quality_ratio)
        cells["gain"] = round(relative if quality["better"] == "higher" else -relative, 6)
    if ratio := ratio_text(row):
        cells["ratio"] = ratio
        assert row.cost_ratio is not None
        cells["saving"] = round(row.cost_ratio if cost["better"] == "lower" else 1 / row.cost_ratio, 6)
    return cells
