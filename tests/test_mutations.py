"""The list of mutations: each still has its place in the sources, and (slow) each is caught by its test."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutations import MUTATIONS, ROOT, Mutation, survivors


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_each_has_its_place_and_its_test(mutation: Mutation) -> None:
    source = (ROOT / "src" / "modicum" / mutation.file).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1, f"{mutation.file} has {source.count(mutation.old)} times: {mutation.old}"
    assert mutation.new != mutation.old
    name, _, test = mutation.test.partition("::")
    tree = ast.parse((ROOT / "tests" / name).read_text(encoding="utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not test or test in found, f"{name} has no {test}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_is_caught() -> None:
    assert survivors(MUTATIONS) == []
