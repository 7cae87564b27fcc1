"""Write the README's catalogue and docs/ports from registry and evidence, or check that they are current."""

from __future__ import annotations

from typing import Annotated

import typer


def catalogue(
    write: Annotated[bool, typer.Option("--write", help="Bring the generated files up to date.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if one of them is stale.")] = False,
) -> None:
    """Write the README's catalogue and docs/ports from registry and evidence; with no option, print it."""
    from modicum.bench import catalogue as made
    from modicum.bench import record
    from modicum.core.errors import ModicumError, UserError

    home = record.checkout()
    if home is None and (write or check):
        raise UserError("modicum is installed, not a checkout: there is no README to write; type: modicum catalogue")
    if write and home:
        for path in made.write(home):
            print(f"wrote {path.relative_to(home)}")
    if check and home:
        wrong = made.stale(home)
        if wrong:
            raise ModicumError(
                f"stale: {', '.join(str(p.relative_to(home)) for p in wrong)}; "
                "type: modicum catalogue --write, and commit them"
            )
    if not write and not check:
        print(made.table())
