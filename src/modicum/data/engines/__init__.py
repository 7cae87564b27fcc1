"""Engines: where the pipeline's tasks run. Both give the same output, because a task writes its own files.

A task is a function's name and a JSON-able argument, so nothing is pickled and any process can run it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from modicum.core.errors import CorruptError, ModicumError, UserError, unknown

ENGINES = ("local", "ray")
_KINDS = {"UserError": UserError, "CorruptError": CorruptError, "MissingExtra": UserError, "BudgetError": UserError}


class Engine(Protocol):
    """A context manager: leaving it ends its processes."""

    def run(self, function: str, tasks: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, result) of `MODULE:NAME` applied to each task, as they end. Raises a task's own error."""

    def __enter__(self) -> Engine: ...
    def __exit__(self, *error: object) -> None: ...


def make(name: str, processes: int) -> Engine:
    if processes < 1:
        raise UserError(f"processes={processes} must be at least 1")
    if name == "local":
        from modicum.data.engines.local import Local

        return Local(processes)
    if name == "ray":
        from modicum.data.engines.ray import Ray

        return Ray(processes)
    raise unknown("engine", name, ENGINES)


def answer(reply: dict[str, Any]) -> dict[str, Any]:
    """A worker's result, or its error raised here."""
    if "error" in reply:
        raise _KINDS.get(reply["error"], ModicumError)(reply["message"])
    result: dict[str, Any] = reply["result"]
    return result
