"""A law drawn: what was measured, the fitted curves with their spread, predictions and held-out runs with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modicum.laws.curve import CurveLaw
from modicum.laws.fit import Fit
from modicum.laws.table import FLOPS_PER_PARAMETER_TOKEN, Runs, as_table

BLUE, GREY, RED, ORANGE = "#2457a7", "#8a8f98", "#c0392b", "#d98324"
MOST_CURVES = 8


def figure(
    law: CurveLaw,
    fit: Fit,
    runs: Runs,
    points: Runs | None = None,
    level: float = 0.95,
    measured: Sequence[float] | None = None,
    heldout: Sequence[dict[str, Any]] = (),
) -> Any:
    """A plotly figure: the law's target against training FLOPs (or the law's own quantity).

    For a law of parameters and tokens one curve is drawn per model size, through that size's token range and on to the
    predicted points, which get the band of the fitted law beside the interval of a new run. measured: what was reached
    at `points`, once known. heldout: rows of a back-test (`laws.backtest`), predicted by fits that had not seen them.
    """
    import plotly.graph_objects as go

    table = as_table(runs, law.reads, target=law.target)
    two = set(law.reads) == {"parameters", "tokens"}

    def across(rows: Any) -> np.ndarray:
        if two:
            return FLOPS_PER_PARAMETER_TOKEN * np.asarray(rows["parameters"]) * np.asarray(rows["tokens"])
        return np.asarray(rows[law.reads[0]])

    chart = go.Figure()
    ahead = as_table(points, law.reads, target=None) if points is not None else None
    for name, line, new in _lines(law, table, ahead, two):
        if new:
            _band(chart, law, fit, line, across(line), level)
        chart.add_scatter(
            x=across(line),
            y=law.value(fit.parameters, line),
            mode="lines",
            name=name,
            line={"color": BLUE if new else GREY, "width": 1.5},
            opacity=0.7,
        )
    chart.add_scatter(
        x=across(table),
        y=table[law.target],
        mode="markers",
        name="measured runs",
        marker={"color": GREY, "size": 7, "line": {"color": "white", "width": 1}},
    )
    if heldout:
        columns = {name: np.array([row[name] for row in heldout]) for name in heldout[0]}
        _predicted(chart, across(columns), columns, f"held out, {level:.0%} interval", ORANGE)
        _crosses(chart, across(columns), columns[law.target], "held out, measured")
    if ahead is not None and points is not None:
        given = law.predict(fit, points, level)
        columns = {"mean": given.mean, "low": given.low, "high": given.high}
        _predicted(chart, across(ahead), columns, f"predicted, {level:.0%} interval", BLUE)
        if measured is not None:
            _crosses(chart, across(ahead), np.asarray(measured), "outcome")
    chart.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        height=460,
        legend={"orientation": "h", "y": -0.22},
        xaxis={"type": "log", "title": "training FLOPs (6 × parameters × tokens)" if two else law.reads[0]},
        yaxis={"type": "log" if law.target == "loss" else "linear", "title": law.target},
    )
    return chart


def _lines(law: CurveLaw, table: Any, ahead: Any, two: bool) -> list[tuple[str, dict[str, np.ndarray], bool]]:
    """(name, points, whether it leads to a prediction) of each curve."""
    if not two:
        name = law.reads[0]
        values = np.concatenate([table[name], ahead[name] if ahead is not None else []])
        low, high = values[values > 0].min() / 1.5, 1.5 * values.max()
        others = {n: np.full(120, float(np.median(table[n]))) for n in law.reads[1:]}
        return [("law", {name: np.geomspace(low, high, 120)} | others, True)]
    sizes = list(np.unique(table["parameters"]))
    if len(sizes) > MOST_CURVES:
        sizes = [sizes[i] for i in np.linspace(0, len(sizes) - 1, MOST_CURVES).round().astype(int)]
    spans = []
    for size in sizes:
        tokens = table["tokens"][table["parameters"] == size]
        spans.append((size, tokens.min() / 1.5, tokens.max() * 1.5, False))
    if ahead is not None:
        ends = zip(ahead["parameters"], ahead["tokens"], strict=True)
        spans += [(size, min(table["tokens"].min(), end / 2), 1.5 * end, True) for size, end in ends]
    return [
        (f"{size:.3g} parameters", {"parameters": np.full(60, size), "tokens": np.geomspace(low, high, 60)}, new)
        for size, low, high, new in spans
    ]


def _band(chart: Any, law: CurveLaw, fit: Fit, line: dict[str, np.ndarray], x: np.ndarray, level: float) -> None:
    """Where the fitted law may run, without the spread of a single run."""
    low, high = fit.interval(law.unlink(law.curve_at(fit, line)), level)
    chart.add_scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([low, high[::-1]]),
        fill="toself",
        fillcolor="rgba(36,87,167,0.12)",
        line={"width": 0},
        hoverinfo="skip",
        name=f"law, {level:.0%} of its draws",
        showlegend=False,
    )


def _predicted(chart: Any, x: np.ndarray, columns: dict[str, np.ndarray], name: str, colour: str) -> None:
    mean, low, high = (columns[n] for n in ("mean", "low", "high"))
    chart.add_scatter(
        x=x,
        y=mean,
        mode="markers",
        name=name,
        marker={"color": colour, "size": 9, "symbol": "diamond"},
        error_y={"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low, "color": colour},
    )


def _crosses(chart: Any, x: np.ndarray, y: np.ndarray, name: str) -> None:
    chart.add_scatter(x=x, y=y, mode="markers", name=name, marker={"color": RED, "size": 9, "symbol": "x"})
