"""Write docs/methods and the README's table from registry and evidence, or check that they are current."""

from __future__ import annotations

from typing import Annotated

import typer


def catalogue(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a file is stale.")] = False,
    write: Annotated[bool, typer.Option("--write", hidden=True)] = False,
) -> None:
    """Write docs/methods and the README's table from registry and evidence, or check that they are current."""
    from modicum.bench import catalogue as made
    from modicum.bench import record
    from modicum.core.errors import ModicumError, UserError

    home = record.checkout()
    if home is None:
        raise UserError("modicum is installed, not a checkout: there are no docs to write; type: modicum ls")
    if not check:
        for path in made.write(home):
            print(f"wrote {path.relative_to(home)}")
    elif wrong := made.stale(home):
        raise ModicumError(
            f"stale: {', '.join(str(p.relative_to(home)) for p in wrong)}; type: modicum catalogue, and commit them"
        )
