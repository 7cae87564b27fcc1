"""Recipes by name: found anywhere, a file of the same name wins, near misses are named."""

from __future__ import annotations

import pytest

from modicum.core.errors import UserError
from modicum.pipeline.named import find, recipes, summary
from modicum.pipeline.recipe import load


def test_names_are_found_anywhere_and_files_win(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("quickstart") == recipes()["quickstart"]
    assert load("quickstart", ["seed=7"]).seed == 7
    (tmp_path / "quickstart").write_text("name: mine\n")
    assert load("quickstart").name == "mine"


def test_what_is_not_there_is_refused_with_what_is(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        find("quikstart")
    (tmp_path / "other.yaml").write_text("name: other\n")
    with pytest.raises(UserError, match=r"no recipe at 'mine\.yaml'; there: other\.yaml; by name: .*quickstart"):
        find("mine.yaml")


def test_every_recipe_begins_with_a_sentence() -> None:
    for path in recipes().values():
        assert len(summary(path)) > 20 and "\n" not in summary(path), path
