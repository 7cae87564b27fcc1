"""The report's figures, as Plotly JSON. Colours work on white and on black paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from modicum.core.events import read_events
from modicum.pipeline.context import Run

BLUE, ORANGE, GREEN, GREY, RED = "#3b7dd8", "#e07b39", "#3f9e6b", "#8a8f98", "#cc4b4b"


def figure(traces: list[dict[str, Any]], x: str, y: str, **layout: Any) -> dict[str, Any]:
    axis = {"gridcolor": "rgba(128,128,128,.18)", "zeroline": False, "automargin": True}
    base: dict[str, Any] = {
        "margin": {"l": 8, "r": 12, "t": 44, "b": 8},
        "height": 340,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 13, "color": GREY},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "xaxis": axis | {"title": {"text": x}} | layout.pop("xaxis", {}),
        "yaxis": axis | {"title": {"text": y}} | layout.pop("yaxis", {}),
    }
    return {"data": traces, "layout": base | layout, "config": {"displayModeBar": False, "responsive": True}}


def line(name: str, x: list[Any], y: list[Any], color: str, **more: Any) -> dict[str, Any]:
    width = {"color": color, "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": width} | more


def graded(figures: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any] | None:
    """Exact match and token F1 of every model, closed book and grounded, with 95% intervals."""
    grades = figures.get("graded")
    if not grades:
        return None
    traces = []
    for colour, arm, label in ((GREY, "closed", "closed book"), (BLUE, "retrieved", "grounded")):
        bars = [
            (f"{names[role]}<br>{title}", g["figures"][arm][figure])
            for figure, title in (("exact", "exact match"), ("f1", "token F1"))
            for role, g in grades.items()
        ]
        traces.append(
            {
                "type": "bar",
                "name": label,
                "x": [name for name, _ in bars],
                "y": [v["value"] for _, v in bars],
                "marker": {"color": colour},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [v["high"] - v["value"] for _, v in bars],
                    "arrayminus": [v["value"] - v["low"] for _, v in bars],
                },
            }
        )
    return figure(traces, "", "fraction of held-out questions", barmode="group", yaxis={"range": [0, 1]})


def adapting(run: Run, stage: str) -> dict[str, Any] | None:
    """The loss on answers while the model is adapted, and on held-out ones before and after."""
    steps = {e["tokens"]: e["loss"] for e in read_events(run.folder / "events.jsonl", "train", stage)}
    heldout = {e["tokens"]: e["loss"] for e in read_events(run.folder / "events.jsonl", "heldout", stage)}
    if len(steps) < 2:
        return None
    xs, ys = sorted(steps), sorted(heldout)
    traces = [line("training answers", xs, [steps[x] for x in xs], BLUE)]
    if heldout:
        traces.append(line("held-out answers", ys, [heldout[x] for x in ys], ORANGE, mode="lines+markers"))
    return figure(traces, "tokens", "loss (nats per answer token)", height=260)


def loss_curve(run: Run, stage: str) -> dict[str, Any] | None:
    steps = {e["tokens"]: e for e in read_events(run.folder / "events.jsonl", "train", stage)}
    heldout = {e["tokens"]: e for e in read_events(run.folder / "events.jsonl", "heldout", stage)}
    if not steps:
        return None
    xs = sorted(steps)
    smooth, value = [], None
    for x in xs:
        value = steps[x]["loss"] if value is None else 0.9 * value + 0.1 * steps[x]["loss"]
        smooth.append(value)
    traces = [
        line("training loss", xs, [steps[x]["loss"] for x in xs], BLUE, opacity=0.3, showlegend=False),
        line("training loss (smoothed)", xs, smooth, BLUE),
    ]
    if heldout:
        ys = sorted(heldout)
        traces.append(line("held-out loss", ys, [heldout[x]["loss"] for x in ys], ORANGE, mode="lines+markers"))
    top = sorted(steps[x]["loss"] for x in xs)[int(len(xs) * 0.97)]
    return figure(traces, "tokens", "loss (nats per token)", yaxis={"range": [min(smooth) * 0.95, top * 1.02]})


def law(figures: Mapping[str, Any], main: Mapping[str, Any] | None) -> dict[str, Any]:
    """figures: of the prediction; main: of the run that it is about."""
    p = figures["prediction"]
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "proxy runs (used for the fit)",
            "x": [6 * r["parameters"] * r["tokens"] for r in figures["proxies"]],
            "y": [r["loss"] for r in figures["proxies"]],
            "marker": {"color": GREY, "size": 9},
            "text": [f"{r['parameters']:,} parameters, {r['tokens']:,.0f} tokens" for r in figures["proxies"]],
        }
    ]
    x = 6 * p["parameters"] * p["tokens"]
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"prediction, {p['level']:.0%} interval",
            "x": [x],
            "y": [p["mean"]],
            "marker": {"color": ORANGE, "size": 10, "symbol": "diamond"},
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [p["high"] - p["mean"]],
                "arrayminus": [p["mean"] - p["low"]],
                "color": ORANGE,
                "thickness": 2,
                "width": 6,
            },
        }
    )
    if main is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "measured afterwards",
                "x": [x],
                "y": [main["heldout_loss"]],
                "marker": {"color": GREEN, "size": 13, "symbol": "x-thin", "line": {"color": GREEN, "width": 3}},
            }
        )
    return figure(traces, "training FLOPs (6 · parameters · tokens)", "held-out loss", xaxis={"type": "log"})


def compression(figures: Mapping[str, Any]) -> dict[str, Any]:
    variants = figures["variants"]
    compressors = figures["compressors"]
    colours = [BLUE, GREEN, ORANGE, RED, "#8a63c9", "#b59b2a"]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": v["name"],
            "x": [v["bytes"] / 1e6],
            "y": [v["bits_per_byte"]],
            "text": ["as published" if v.get("role") == "before" else v["name"]],
            "textposition": "middle right",
            "error_y": {"type": "data", "array": [2 * v.get("stderr", 0)], "color": colours[i % 6]},
            "marker": {"color": colours[i % 6], "size": 11},
            "showlegend": False,
        }
        for i, v in enumerate(variants)
    ]
    widest = max(v["bytes"] for v in variants) / 1e6 * 1.15
    for i, (name, value) in enumerate(compressors.items()):
        traces.append(
            line(
                name,
                [0, widest],
                [value, value],
                GREY,
                line={"color": GREY, "width": 1.5, "dash": ["dash", "dot", "dashdot", "longdash"][i % 4]},
            )
        )
    return figure(traces, "stored model, megabytes", "held-out bits per byte", xaxis={"range": [0, widest]})


def retrieval(figures: Mapping[str, Any]) -> dict[str, Any]:
    metrics = figures["metrics"]
    traces = []
    for colour, (setting, by_mode) in zip((BLUE, ORANGE), metrics.items(), strict=False):
        modes = list(by_mode)
        traces.append(
            {
                "type": "bar",
                "name": setting,
                "x": modes,
                "y": [by_mode[m]["mrr"] for m in modes],
                "marker": {"color": colour},
                "error_y": {"type": "data", "array": [2 * by_mode[m].get("mrr_stderr", 0) for m in modes]},
            }
        )
    return figure(traces, "", "mean reciprocal rank at 10", barmode="group", yaxis={"range": [0, 1]})


def ledger_plot(rows: list[Any]) -> dict[str, Any]:
    """Measured over planned for time and memory, by stage; the promised bands are shaded."""
    traces = []
    for colour, name, label in ((BLUE, "seconds", "time"), (ORANGE, "peak_bytes", "peak memory")):
        pairs = [(r.stage, r.entries[name].error) for r in rows if r.entries[name].error is not None]
        traces.append(
            {
                "type": "bar",
                "name": label,
                "x": [s for s, _ in pairs],
                "y": [100 * e for _, e in pairs],
                "marker": {"color": colour},
            }
        )
    bands = [
        {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": -b, "y1": b, "line": {"width": 0}, "fillcolor": c}
        for b, c in ((30, "rgba(59,125,216,.08)"), (15, "rgba(224,123,57,.10)"))
    ]
    widest = max((abs(v) for t in traces for v in t["y"]), default=30)
    return figure(
        traces,
        "",
        "measured against planned, %",
        shapes=bands,
        barmode="group",
        yaxis={"range": [-max(35, math.ceil(widest * 1.1)), max(35, math.ceil(widest * 1.1))]},
    )
