"""A law drawn: measured losses, the fitted curves, and predictions with their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from modicum.laws.curve import CurveLaw
from modicum.laws.fit import Fit
from modicum.laws.table import FLOPS_PER_PARAMETER_TOKEN, Runs, as_table

BLUE, GREY, RED = "#2457a7", "#8a8f98", "#c0392b"


def figure(
    law: CurveLaw,
    fit: Fit,
    runs: Runs,
    points: Runs | None = None,
    level: float = 0.95,
    measured: list[float] | None = None,
) -> Any:
    """A plotly figure: loss against training FLOPs (or the law's own quantity).

    For a law of parameters and tokens one curve is drawn per model size, through that size's token range
    and on to the predicted points. `measured`: the losses reached at `points`, once known.
    """
    import plotly.graph_objects as go

    table = as_table(runs, law.reads)
    two = set(law.reads) == {"parameters", "tokens"}

    def across(rows: Any) -> np.ndarray:
        return (FLOPS_PER_PARAMETER_TOKEN * rows["parameters"] * rows["tokens"]) if two else rows[law.reads[0]]

    chart = go.Figure()
    ahead = as_table(points, law.reads, target=None) if points is not None else None
    if two:
        sizes = list(np.unique(table["parameters"]))
        if len(sizes) > 8:
            sizes = [sizes[i] for i in np.linspace(0, len(sizes) - 1, 8).round().astype(int)]
        curves = [
            (
                n,
                table["tokens"][table["parameters"] == n].min() / 1.5,
                table["tokens"][table["parameters"] == n].max() * 1.5,
                GREY,
            )
            for n in sizes
        ]
        if ahead is not None:
            curves += [
                (n, table["tokens"].min(), 1.5 * d, BLUE)
                for n, d in zip(ahead["parameters"], ahead["tokens"], strict=True)
            ]
        for n, low, high, colour in curves:
            tokens = np.geomspace(low, high, 60)
            line = {"parameters": np.full(60, n), "tokens": tokens}
            chart.add_scatter(
                x=across(line),
                y=law.value(fit.parameters, line),
                mode="lines",
                name=f"{n:.3g} parameters",
                line={"color": colour, "width": 1.5},
                opacity=0.7,
            )
    else:
        top = max(float(table[law.reads[0]].max()), float(across(ahead).max()) if ahead is not None else 0.0)
        line = {law.reads[0]: np.geomspace(float(table[law.reads[0]].min()) / 1.5, 1.5 * top, 120)}
        chart.add_scatter(
            x=across(line),
            y=law.value(fit.parameters, line),
            mode="lines",
            name="law",
            line={"color": BLUE, "width": 1.5},
        )
    chart.add_scatter(
        x=across(table),
        y=table["loss"],
        mode="markers",
        name="measured runs",
        marker={"color": GREY, "size": 7, "line": {"color": "white", "width": 1}},
    )
    if ahead is not None:
        predicted = law.predict(fit, points if points is not None else {}, level)
        chart.add_scatter(
            x=across(ahead),
            y=predicted.mean,
            mode="markers",
            name=f"predicted, {level:.0%} interval",
            marker={"color": BLUE, "size": 10, "symbol": "diamond"},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": predicted.high - predicted.mean,
                "arrayminus": predicted.mean - predicted.low,
                "color": BLUE,
            },
        )
        if measured is not None:
            chart.add_scatter(
                x=across(ahead),
                y=measured,
                mode="markers",
                name="outcome",
                marker={"color": RED, "size": 10, "symbol": "x"},
            )
    name = "training FLOPs (6 × parameters × tokens)" if two else law.reads[0]
    chart.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        height=460,
        legend={"orientation": "h", "y": -0.22},
        xaxis={"type": "log", "title": name},
        yaxis={"type": "log", "title": "loss"},
    )
    return chart
