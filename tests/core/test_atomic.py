"""Atomic files: whole or absent, with the permissions that a plain file would have."""

import os
import stat

import pytest

from modicum.core.files import atomic_directory, atomic_file, write_text


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_those_of_any_new_file_or_of_what_is_replaced(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_text(tmp_path / "new", "x")
    assert mode(tmp_path / "new") == mode(plain)
    with atomic_directory(tmp_path / "folder") as folder:
        (folder / "file").write_text("x")
    (tmp_path / "made").mkdir()
    assert mode(tmp_path / "folder") == mode(tmp_path / "made")
    os.chmod(tmp_path / "new", 0o600)
    write_text(tmp_path / "new", "y")
    assert mode(tmp_path / "new") == 0o600


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "file", "w") as handle:
        handle.write("new")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
