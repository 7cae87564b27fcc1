"""What several rooms' tests share."""

from __future__ import annotations

import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modicum.core import registry

Install = Callable[[str, str, str], Path]


@pytest.fixture
def install_plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install_plugin(entry, module, source)`: a module of another distribution, with one entry point.

    entry: `group:name`, as in modicum.methods:linear/mine. Returns the folder that the module lies in. Everything is
    forgotten after the test.
    """
    modules: list[str] = []

    def forget() -> None:
        registry.methods.cache_clear()
        registry.load.cache_clear()

    def install(entry: str, module: str, source: str) -> Path:
        group, name = entry.split(":")
        folder = tmp_path_factory.mktemp("plugin")
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(folder))
        point = importlib.metadata.EntryPoint(name, module, group)
        real = importlib.metadata.entry_points
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda **chosen: (*real(**chosen), point) if chosen.get("group") == group else real(**chosen),
        )
        modules.append(module)
        forget()
        return folder

    yield install
    monkeypatch.undo()
    for module in modules:
        sys.modules.pop(module, None)
    forget()
