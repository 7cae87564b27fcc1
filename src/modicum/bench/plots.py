"""Quality against cost: an interactive page for a bench, and a small SVG for the port's page of the docs.

Both draw one point per method (mean over seeds, bars of one standard deviation), the baseline as a
diamond, and the methods that no other beats on both axes joined by a line (the Pareto front).
"""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from modicum.bench.stats import Row, number, spread_text
from modicum.core.files import write_text

COLOURS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#7c3aed",
    "#db2777",
    "#0891b2",
    "#65a30d",
    "#b91c1c",
    "#475569",
    "#92400e",
)


def front(rows: list[Row]) -> list[Row]:
    """Rows that no other row beats on one axis without losing on the other, by rising cost."""
    axes = rows[0].axes
    sign = {name: 1 if axis["better"] == "lower" else -1 for name, axis in axes.items()}
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda r: (sign["cost"] * r.cost.mean, sign["quality"] * r.quality.mean)):
        if sign["quality"] * row.quality.mean < best:
            best = sign["quality"] * row.quality.mean
            kept.append(row)
    return kept


def axis_title(axis: dict[str, str]) -> str:
    named = not axis["unit"] or axis["unit"] in axis["metric"].split("_")
    unit = "" if named else f" ({axis['unit']})"
    return f"{axis['metric'].replace('_', ' ')}{unit}, {axis['better']} is better"


def figure(rows: list[Row]) -> Any:
    """The plotly figure of a comparison."""
    import plotly.graph_objects as go

    drawing, axes = go.Figure(), rows[0].axes
    line = front(rows)
    if len(line) > 1:
        drawing.add_trace(
            go.Scatter(
                x=[r.cost.mean for r in line],
                y=[r.quality.mean for r in line],
                mode="lines",
                name="Pareto front",
                line={"color": "#94a3b8", "dash": "dot"},
                hoverinfo="skip",
            )
        )
    for i, row in enumerate(rows):
        note = "<br>".join(f"{html.escape(k)}: {spread_text(v, '')}" for k, v in row.metrics.items())
        drawing.add_trace(
            go.Scatter(
                x=[row.cost.mean],
                y=[row.quality.mean],
                name=row.choice + (" (baseline)" if row.is_baseline else ""),
                mode="markers+text",
                text=[row.choice],
                textposition="top center",
                cliponaxis=False,
                error_y={"array": [row.quality.std or 0], "thickness": 1},
                error_x={"array": [row.cost.std or 0], "thickness": 1},
                marker={
                    "size": 14,
                    "symbol": "diamond" if row.is_baseline else "circle",
                    "color": COLOURS[i % len(COLOURS)],
                },
                hovertemplate=f"<b>{html.escape(row.choice)}</b><br>{note}<extra></extra>",
            )
        )
    drawing.update_layout(
        xaxis_title=axis_title(axes["cost"]),
        yaxis_title=axis_title(axes["quality"]),
        template="plotly_white",
        font={"size": 14},
        legend={"orientation": "h", "y": -0.2},
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
    )
    return drawing


def write_page(path: Path, port: str, parts: list[list[Row]]) -> None:
    """A self-contained page with one figure for each pair of axes: it opens without network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = [
        figure(rows).to_html(
            include_plotlyjs=i == 0, full_html=False, config={"responsive": True, "displayModeBar": False}
        )
        for i, rows in enumerate(parts)
    ]
    write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        "<style>body { font-family: sans-serif; max-width: 70rem; margin: 1rem auto; padding: 0 0.5rem; }</style>"
        f"<title>modicum bench {html.escape(port)}</title></head><body><h1>{html.escape(port)}</h1><p>Mean and "
        f"standard deviation over seeds {', '.join(str(s) for s in parts[0][0].seeds)}.</p>"
        f"{''.join(figures)}</body></html>",
    )


def svg(port: str, rows: list[Row], width: int = 640, height: int = 360) -> str:
    """The same picture without a script, the same bytes for the same rows."""
    axes = rows[0].axes
    left, right, top, bottom = 80, 24, 28, 52
    xs, ys = _range([r.cost for r in rows]), _range([r.quality for r in rows])

    def x(value: float) -> float:
        return left + (value - xs[0]) / (xs[1] - xs[0]) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - ys[0]) / (ys[1] - ys[0]) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{html.escape(port)}: quality against cost">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for value in ticks(*ys):
        at = y(value)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e2e8f0"/>'
            f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end" fill="#475569">{number(value)}</text>'
        )
    for value in ticks(*xs):
        parts.append(
            f'<text x="{x(value):.1f}" y="{height - bottom + 18}" text-anchor="middle" fill="#475569">'
            f"{number(value)}</text>"
        )
    line = front(rows)
    if len(line) > 1:
        points = " ".join(f"{x(r.cost.mean):.1f},{y(r.quality.mean):.1f}" for r in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="#94a3b8" stroke-dasharray="3 4"/>')
    for i, row in enumerate(rows):
        colour, cx, cy = COLOURS[i % len(COLOURS)], x(row.cost.mean), y(row.quality.mean)
        if row.quality.std:
            parts.append(
                f'<line x1="{cx:.1f}" x2="{cx:.1f}" y1="{y(row.quality.mean - row.quality.std):.1f}" '
                f'y2="{y(row.quality.mean + row.quality.std):.1f}" stroke="{colour}"/>'
            )
        shape = (
            f'<rect x="{cx - 5:.1f}" y="{cy - 5:.1f}" width="10" height="10" transform="rotate(45 {cx:.1f} {cy:.1f})"'
            if row.is_baseline
            else f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5"'
        )
        anchor, shift = ("end", -9) if cx > width - 150 else ("start", 9)
        parts.append(
            f'{shape} fill="{colour}"/><text x="{cx + shift:.1f}" y="{cy - 7:.1f}" text-anchor="{anchor}" '
            f'fill="{colour}">{html.escape(row.choice)}</text>'
        )
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle" fill="#0f172a">'
        f"{html.escape(axis_title(axes['cost']))}</text>"
        f'<text x="8" y="16" fill="#0f172a">{html.escape(axis_title(axes["quality"]))}</text></svg>'
    )
    return "\n".join(parts) + "\n"


def _range(spreads: list[Any]) -> tuple[float, float]:
    low = min(s.mean - (s.std or 0) for s in spreads)
    high = max(s.mean + (s.std or 0) for s in spreads)
    margin = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next((m for m in (5, 2) if (high - low) / (step * m) >= 3), 1)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
