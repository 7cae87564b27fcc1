"""Start a method: its file and its reference test, from the port's template."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new(
    port: Annotated[str, typer.Argument(help="A port, e.g. optimizer.")],
    key: Annotated[str, typer.Argument(help="The method's key, e.g. my-method.")],
    to: Annotated[
        Path | None, typer.Option(help="Write a separate package here, instead of a file in the checkout.")
    ] = None,
) -> None:
    """Start a method: its file and its reference test, from the port's template. Both pass their tests unchanged."""
    from modicum.bench import scaffold

    made = scaffold.plugin(port, key, to) if to else scaffold.in_checkout(port, key)
    for path in (made.method, made.test, *made.others):
        print(f"wrote {path}")
    install = f"pip install -e {to} && " if to else ""
    print(
        f"\nnext: edit it into your method, then\n  {install}modicum check {port} {key}\n"
        f"  pytest {made.test}\n  modicum bench {port} {key}"
    )
