"""A port's conformance suite, run for one method or all: what must hold for any method of the port.

The suite is `_conformance.py` beside the methods: functions `check_SOMETHING(key)` that assert.
"""

from __future__ import annotations

import ast
import importlib
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from modicum.core import registry
from modicum.core.errors import UserError, unknown
from modicum.core.registry import PortInfo


@dataclass(frozen=True)
class Check:
    """One function of a suite, as text: nothing is imported to list it."""

    port: str
    name: str
    summary: str


@dataclass(frozen=True)
class Result:
    port: str
    method: str
    check: str
    passed: bool
    seconds: float
    message: str = ""  # what does not hold
    where: str = ""  # file:line of the deepest own frame


def checks(info: PortInfo) -> list[Check]:
    """The checks of a port in file order. Raises `UserError` if it has no suite."""
    path = info.path / "_conformance.py"
    if not path.exists():
        raise UserError(f"port {info.name} has no conformance suite; write {path} with functions check_SOMETHING(key)")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    cases = [
        Check(info.name, n.name, (ast.get_docstring(n) or "").split("\n")[0])
        for n in tree.body
        if isinstance(n, ast.FunctionDef) and n.name.startswith("check_")
    ]
    if not cases:
        raise UserError(f"{path} holds no function named check_SOMETHING")
    return cases


def check(port: str, name: str, key: str) -> None:
    """Run one check on one method; raises what it raises."""
    module = importlib.import_module(f"{registry.port(port).package}._conformance")
    getattr(module, name)(key)


def every() -> list[tuple[str, str, str]]:
    """(port, method, check) of the whole registry; ports without a suite are left out. Imports nothing."""
    return [
        (port.name, key, c.name)
        for port in registry.ports().values()
        if (port.path / "_conformance.py").exists()
        for key in registry.methods(port.name)
        for c in checks(port)
    ]


def run(port: str, keys: list[str] | None = None) -> Iterator[Result]:
    """Results one by one, as they are known."""
    known = registry.methods(port)
    for key in keys or known:
        if key not in known:
            raise unknown(f"{port} method", key, known, f"Type: modicum ls {port}")
        for item in checks(registry.port(port)):
            start = time.perf_counter()
            try:
                check(port, item.name, key)
                failure: Any = None
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # an assertion, a crash, or pytest's own outcome
                failure = error
            seconds = time.perf_counter() - start
            if failure is None:
                yield Result(port, key, item.name, True, seconds)
            else:
                text = str(failure).strip().split("\n")[0]
                named = text if isinstance(failure, AssertionError) and text else f"{type(failure).__name__}: {text}"
                yield Result(port, key, item.name, False, seconds, named, _where(failure))


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "modicum" in f.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
