"""Show a port's protocol, one method's card, knobs and figures, or a stage of recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modicum.bench.card import Knob


def show(
    port: Annotated[str, typer.Argument(help="A port, e.g. optimizer; PORT/KEY and stage/KEY work too.")],
    key: Annotated[str | None, typer.Argument(help="A method of it.")] = None,
    evidence: Annotated[Path | None, typer.Option(help="Folder of the records [default: evidence/].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show a port's protocol, or one method's card, knobs and figures, on one screen. Imports no torch."""
    from modicum.bench import card as cards
    from modicum.bench import figures, record
    from modicum.core import registry
    from modicum.core.errors import unknown

    if key is None and "/" in port:
        port, _, key = port.partition("/")
    if port in ("stage", "stages"):
        _stage(key, as_json)
        return
    info = registry.port(port)
    if key is None:
        text = cards.port_text(info)
        if as_json:
            print(
                json.dumps(
                    {
                        "port": port,
                        "room": info.package_name,
                        "baseline": info.baseline,
                        "path": str(info.path),
                        "protocol": text,
                        "methods": list(registry.methods(port)),
                    },
                    indent=2,
                )
            )
            return
        print(
            f"{text}\n\nbaseline  {info.baseline}\nmethods   {', '.join(registry.methods(port))}\nplace     {info.path}"
        )
        return
    known = registry.methods(port)
    if key not in known:
        raise unknown(f"{port} method", key, known, f"Type: modicum ls {port}")
    card = cards.read_card(known[key])
    measured = figures.of_method(record.read(record.folder(evidence), port), key)
    if as_json:
        print(
            json.dumps(
                {
                    "port": port,
                    "method": key,
                    "card": card.text,
                    "path": str(card.path),
                    "knobs": [vars(k) for k in card.knobs],
                    **card.capabilities,
                    "claim": card.claim,
                    "measured": [
                        vars(group[0].lab)
                        | {"rows": [row.as_dict() | {"verdict": figures.verdict(row)} for row in rows]}
                        for group, rows in measured
                    ],
                },
                indent=2,
            )
        )
        return
    print("\n".join(figures.screen(card, measured)))


def _knobs(knobs: Sequence[Knob]) -> None:
    width = max((len(k.name) for k in knobs), default=0)
    for knob in knobs:
        print(
            f"  {knob.name:<{width}}  {knob.type}{' = ' + knob.default if knob.default else '  (required)'}"
            + (f"    {knob.note}" if knob.note else "")
        )
    if knobs:
        print()


def _stage(key: str | None, as_json: bool) -> None:
    from modicum.bench.card import fields
    from modicum.core.errors import unknown
    from modicum.pipeline.stage import stages

    if key not in stages():
        raise unknown("stage", key or "", stages(), "Type: modicum ls stages")
    stage = stages()[key]
    knobs = fields(stage.path, "Section")
    if as_json:
        rows = {"stage": key, "card": stage.card, "path": str(stage.path), "keys": [vars(k) for k in knobs]}
        print(json.dumps(rows, indent=2))
        return
    print(f"{stage.card}\n")
    _knobs(knobs)
    print(f"file      {stage.path}")
