"""List the ports, one port's methods, or the models, recipes or stages known by name."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from modicum.core import registry


def ls(
    port: Annotated[
        str | None, typer.Argument(help="A port, e.g. optimizer; default: all ports; or: models, recipes, stages.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the ports, one port's methods, or the models, recipes or stages known by name. Imports nothing heavy."""
    named = {"models": _models, "recipes": _recipes, "stages": _stages}
    if port in named:
        named[port](as_json)
        return
    names = [port] if port else list(registry.ports())
    listing = {name: registry.methods(name) for name in names}
    if as_json:
        print(json.dumps({p: {k: m.summary for k, m in infos.items()} for p, infos in listing.items()}, indent=2))
        return
    for name, infos in listing.items():
        info = registry.port(name)
        print(f"{name}: {info.summary}  ({info.package_name})")
        for key, method in infos.items():
            print(f"  {key + (' *' if key == info.baseline else ''):<18} {method.summary}")
    print("\n* baseline    modicum show PORT KEY for one method's card and knobs")


def _models(as_json: bool) -> None:
    from modicum.budget.units import bytes_text
    from modicum.model import sources

    known = sources.sources().values()
    if as_json:
        rows = {
            s.name: s.record() | {"folder": str(sources.folder_of(s.name)), "fetched": sources.is_fetched(s)}
            for s in known
        }
        print(json.dumps(rows, indent=2))
        return
    for s in known:
        state = "fetched" if sources.is_fetched(s) else f"{bytes_text(sum(p.bytes for p in s.packages))} to fetch"
        print(f"{s.name:<14} {s.kind:<8} {bytes_text(s.bytes):>9}  {state:<18} {s.licence:<19} {s.summary}")
    print("\nmodicum get NAME fetches one; every verb that takes a model does so by itself")


def _recipes(as_json: bool) -> None:
    from modicum.pipeline.named import recipes, summary

    if as_json:
        rows = {name: {"summary": summary(path), "file": str(path)} for name, path in recipes().items()}
        print(json.dumps(rows, indent=2))
        return
    for name, path in recipes().items():
        print(f"{name:<18} {summary(path)}")
    print("\nmodicum run NAME runs one, modicum plan NAME shows its cost estimate")


def _stages(as_json: bool) -> None:
    from modicum.pipeline.stage import stages

    if as_json:
        print(json.dumps({key: {"summary": s.summary, "file": str(s.path)} for key, s in stages().items()}, indent=2))
        return
    for key, stage in stages().items():
        print(f"{key:<18} {stage.summary}")
    print("\nmodicum show stage/KEY for the options of one in a recipe")
