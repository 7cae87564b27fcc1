"""Scores of every checkpoint of a training run, as curves over its tokens.

A run is a folder of `modicum pretrain` (OUT/checkpoints beside OUT/model) or a run directory of recipes, whose stages
hold such folders. How many checkpoints there are is the run's knob `keep`. Their weights are the float32 masters, which
are read without what else a checkpoint holds.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.core.errors import CorruptError, UserError
from modicum.core.files import read_json, write_text

if TYPE_CHECKING:
    from modicum.evaluate.run import TaskResult

WIDTH, HEIGHT, MARGIN = 560, 260, 46  # of a curve's drawing, in pixels


@dataclass(frozen=True)
class Checkpoint:
    """model: the exported folder of the same training, whose shape and tokenizer the checkpoint has."""

    folder: Path
    model: Path
    step: int
    tokens: float

    def load(self, dtype: str | None = None, device: str = "cpu") -> Any:
        """The decoder at this step. Raises UserError where its tensors are not those of the exported model."""
        import torch
        from safetensors import safe_open

        from modicum.model.decoder import Decoder
        from modicum.model.folder import load_config, parse_dtype

        config = load_config(self.model)
        model = Decoder(config)
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        with safe_open(self.folder / "model.safetensors", framework="pt") as file, torch.no_grad():
            stored = set(file.keys())
            missing = [n for n in own if n not in stored and not (config.tied and n == "lm_head.weight")]
            shapes = all(tuple(file.get_slice(n).get_shape()) == tuple(own[n].shape) for n in stored & set(own))
            if stored - set(own) or not shapes or any(n in dict(model.named_parameters()) for n in missing):
                raise UserError(
                    f"{self.folder} holds other tensors than {self.model}: the run grew, pruned or changed its layers, "
                    "and only checkpoints of the final shape can be scored"
                )
            for name in stored:
                own[name].copy_(file.get_tensor(name))
        if config.tied:
            model.lm_head.weight = model.embed.weight
        return model.to(device=device, dtype=parse_dtype(dtype)).eval()


def find(run: str | Path) -> list[Checkpoint]:
    """Every whole checkpoint, oldest first. Raises UserError for a folder without any, or without its model."""
    from modicum.train.checkpoint import Checkpoints, damage

    run = Path(run)
    trainings = [f for f in (run, *sorted(run.glob("stages/*"))) if (f / "checkpoints").is_dir()]
    if not trainings:
        raise UserError(f"{run} has no checkpoints; give the folder of modicum pretrain or of modicum run")
    if len(trainings) > 1:
        raise UserError(f"{run} holds several trainings: {', '.join(map(str, trainings))}; give one of them")
    (folder,) = trainings
    if not (folder / "model" / "config.json").is_file():
        raise UserError(f"{folder} has no finished model beside its checkpoints; let the training end")
    rows = []
    for path in Checkpoints(folder / "checkpoints").all():
        if (reason := damage(path)) is not None:
            raise CorruptError(f"{path}: {reason}; remove it to score the others")
        state = read_json(path / "state.json")
        rows.append(Checkpoint(path, folder / "model", int(path.name[5:]), float(state["tokens"])))
    if not rows:
        raise UserError(f"{folder / 'checkpoints'} is empty; train with keep=NUMBER to keep checkpoints")
    return rows


def row(checkpoint: Checkpoint, results: Sequence[TaskResult]) -> dict[str, Any]:
    """A point of every curve: step, tokens, and the figures of each task."""
    return {
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "tasks": {r.task: {"metric": r.metric, "figures": r.figures} for r in results},
    }


def curves(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, list[tuple[float, float, float]]]]:
    """(task, figure, [(tokens, value, standard error), ...]) of the main figure of each task."""
    for task, entry in rows[-1]["tasks"].items():
        name = entry["metric"]
        points = [(r["tokens"], f["value"], f["stderr"]) for r in rows for f in [r["tasks"][task]["figures"][name]]]
        yield task, name, points


def page(rows: Sequence[dict[str, Any]], path: str | Path, title: str) -> None:
    """A page of one drawing and one table a task, which opens without a network."""
    from modicum.evaluate.run import short

    parts = [f"<h1>{html.escape(title)}</h1>"]
    for task, figure, points in curves(rows):
        chance = rows[-1]["tasks"][task]["figures"][figure].get("chance")
        cells = "".join(
            f"<tr><td>{tokens:,.0f}</td><td>{value:.4f}</td><td>{'' if math.isnan(e) else f'{e:.4f}'}</td></tr>"
            for tokens, value, e in points
        )
        parts.append(
            f"<h2>{html.escape(short(task))}</h2>{drawing(figure, points, chance)}"
            f"<table><tr><th>tokens</th><th>{html.escape(figure)}</th><th>standard error</th></tr>{cells}</table>"
        )
    style = (
        "body{font:15px sans-serif;margin:2em;color:#1e293b}td,th{padding:2px 12px;text-align:right}svg{max-width:100%}"
    )
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>"
    write_text(Path(path), head + "".join(parts))


def drawing(figure: str, points: Sequence[tuple[float, float, float]], chance: float | None = None) -> str:
    """A curve with bars of one standard error, chance as a dotted line, tokens from 0."""
    errors = [0.0 if math.isnan(e) else e for _, _, e in points]
    values = [v + s * e for (_, v, _), e in zip(points, errors, strict=True) for s in (-1, 1)]
    low, high = min([*values, *([chance] if chance is not None else [])]), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    last = max(points[-1][0], 1.0)

    def x(tokens: float) -> float:
        return MARGIN + tokens / last * (WIDTH - 2 * MARGIN)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    lines = [
        f"<polyline fill='none' stroke='#2563eb' points='{' '.join(f'{x(t):.1f},{y(v):.1f}' for t, v, _ in points)}'/>"
    ]
    for (tokens, value, _), e in zip(points, errors, strict=True):
        lines.append(f"<circle cx='{x(tokens):.1f}' cy='{y(value):.1f}' r='3' fill='#2563eb'/>")
        bar = f"x1='{x(tokens):.1f}' x2='{x(tokens):.1f}' y1='{y(value - e):.1f}' y2='{y(value + e):.1f}'"
        lines.append(f"<line {bar} stroke='#2563eb'/>")
    if chance is not None:
        level = f"x1='{MARGIN}' x2='{WIDTH - MARGIN}' y1='{y(chance):.1f}' y2='{y(chance):.1f}'"
        lines.append(f"<line {level} stroke='#94a3b8' stroke-dasharray='3 4'/>")
    axis = f"<path fill='none' stroke='#475569' d='M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}'/>"
    words = "".join(
        f"<text x='{left:.0f}' y='{top:.0f}' font-size='12' text-anchor='{anchor}'>{html.escape(text)}</text>"
        for left, top, anchor, text in (
            (MARGIN - 4, y(low), "end", f"{low:.3g}"),
            (MARGIN - 4, y(high) + 4, "end", f"{high:.3g}"),
            (WIDTH - MARGIN, HEIGHT - MARGIN + 16, "end", f"{last:,.0f} tokens"),
            (MARGIN, MARGIN - 10, "start", figure),
        )
    )
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img'>{axis}{''.join(lines)}{words}</svg>"
