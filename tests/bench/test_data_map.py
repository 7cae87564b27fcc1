"""The map of data methods: every method of the covered ports has one cell of the tree."""

from __future__ import annotations

import re

import pytest

from modicum.bench import data_map
from modicum.bench.pages import own_methods
from modicum.core import registry
from modicum.core.errors import UserError


def test_every_method_has_exactly_one_cell() -> None:
    text = data_map.page()
    for port in data_map.PORTS:
        for key in own_methods(port):
            assert data_map.cell_of(port, key) in data_map.cells()
            assert len(re.findall(rf"\[{re.escape(key)}\]\(methods/{port}\.md\)", text)) == 1, f"{port}/{key}"


def test_no_cell_is_given_to_what_is_not_there() -> None:
    for port, cells in data_map.CELLS.items():
        assert set(cells) <= set(registry.methods(port)) and port in data_map.PORTS
    assert set(data_map.PORTS) <= set(registry.ports())
    assert set(data_map.OTHERS) <= set(data_map.cells()) and data_map.NOT_COVERED in data_map.cells()


def test_an_unknown_cell_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data_map.CELLS["step"], "minhash", "processing/deduplicatoin")
    with pytest.raises(UserError, match="processing/deduplication"):
        data_map.page()


def test_empty_cells_are_shown() -> None:
    rows = {m[1]: m[0] for m in re.findall(r"^(\| (\w[\w-]*) \|.*)$", data_map.page(), flags=re.M)}
    assert set(rows) >= {name for names in data_map.TREE.values() for name in names}
    assert "not covered" in rows["tuning"] and "| – |" in rows["checkpoints"]
