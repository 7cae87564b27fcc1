"""The modules of the serve room import in one direction."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import modicum.serve

ROOT = Path(modicum.serve.__file__).parent


def test_no_module_imports_in_a_circle() -> None:
    """Folders count as one module; imports for the type checker count too, those of conformance suites do not."""
    graph: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        if path.name.startswith("_conformance"):
            continue
        mine = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("modicum.serve"):
                continue
            parts = (node.module or "").split(".")[2:3] or [alias.name for alias in node.names]
            graph.setdefault(mine, set()).update(part for part in parts if part != mine)
    assert len(graph) > 20
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle
