"""Run a port's conformance suite on one method, or on all of them."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def check(
    port: Annotated[str, typer.Argument(help="A port, e.g. optimizer, or PORT/KEY.")],
    key: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Methods; all of the port if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Run a port's conformance suite on one method, or on all of them."""
    from modicum.bench import conformance
    from modicum.core.errors import ModicumError

    if not key and "/" in port:
        port, _, only = port.partition("/")
        key = [only]
    results = []
    for result in conformance.run(port, key):
        results.append(result)
        if not as_json:
            if len({r.method for r in results}) > len({r.method for r in results[:-1]}):
                print(f"{port}/{result.method}")
            check_name = result.check.removeprefix("check_").replace("_", " ")
            status = "ok  " if result.passed else "FAIL"
            print(
                f"  {status}  {check_name:<48} {result.seconds:6.2f} s",
                flush=True,
            )
            if not result.passed:
                print(f"        {result.message}\n        {result.where}")
    failed = [r for r in results if not r.passed]
    if as_json:
        print(json.dumps([vars(r) for r in results], indent=2))
    else:
        seconds = sum(r.seconds for r in results)
        print(f"{len(results) - len(failed)} of {len(results)} checks hold, {seconds:.1f} s")
    if failed:
        names = sorted({r.method for r in failed})
        raise ModicumError(
            f"{port}: {', '.join(names)} {'does' if len(names) == 1 else 'do'} not conform "
            f"({len(failed)} failing); the port's protocol: modicum show {port}"
        )
