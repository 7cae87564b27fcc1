"""Fetch a model by name into the cache, once; `modicum ls models` lists the names."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def get(
    model: Annotated[str, typer.Argument(help="A known name such as smollm2, a hub id OWNER/NAME, or a folder.")],
    again: Annotated[
        bool, typer.Option("--again", help="Fetch a known name again, e.g. after its files changed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Fetch a model by name into the cache, once; every verb that takes a model does this by itself."""
    from pathlib import Path

    from modicum.budget.units import bytes_text
    from modicum.core.files import tree_bytes
    from modicum.model import sources
    from modicum.model.sources.fetch import fetch

    if sources.is_name(model):
        source = sources.source(model)
        shown = source.record() | {"folder": str(fetch(source, again=again))}
    else:
        from modicum.model.folder import find_folder

        shown = {"name": model, "folder": str(find_folder(model))}
    shown["bytes"] = tree_bytes(Path(shown["folder"]))
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    print(f"{shown['folder']}  {bytes_text(shown['bytes'])}")
    if "packages" in shown:
        print(f"source:   {', '.join(f'{n}=={v}' for n, v in shown['packages'].items())}, of {shown['origin']}")
        print(f"licence:  {shown['licence']}")
        for name, file in shown["files"].items():
            if file["bytes"] >= 1 << 20:
                print(f"SHA-256:  {file['sha256']}  {name}")
        verb = (
            f"modicum chat {model}"
            if shown["kind"] == "decoder"
            else f"modicum index SOURCE --out OUT --encoder {model}"
        )
        print(f"next: {verb}")
