"""List the ports, or one port's methods."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from modicum.core import registry


def ls(
    port: Annotated[str | None, typer.Argument(help="A port, e.g. optimizer; all of them if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the ports, or one port's methods. Nothing is imported, so this answers at once."""
    names = [port] if port else list(registry.ports())
    listing = {name: registry.methods(name) for name in names}
    if as_json:
        print(json.dumps({p: {k: m.summary for k, m in found.items()} for p, found in listing.items()}, indent=2))
        return
    for name, found in listing.items():
        info = registry.port(name)
        print(f"{name}: {info.summary}  ({info.room})")
        for key, method in found.items():
            print(f"  {key + (' *' if key == info.baseline else ''):<18} {method.summary}")
    print("\n* baseline    modicum show PORT KEY for one method's card and knobs")
