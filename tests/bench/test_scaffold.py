"""`modicum new`: what it makes of a port's baseline conforms, lints and type-checks, here and as a plug-in."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modicum.bench import conformance, record, scaffold
from modicum.core import registry
from modicum.core.errors import UserError

KEY = "scaffolded-one"
ONLY_BASELINES = {
    ("memory", "check_names_what_it_saves")
}  # every other method saves something, a copy of none does not


def install(folder: Path, place: Path) -> None:
    """What an installer does with a plug-in: its entry points stand in a .dist-info on the path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = place / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    rows = [f"{name} = {value}" for name, value in project["entry-points"]["modicum.methods"].items()]
    (info / "entry_points.txt").write_text("[modicum.methods]\n" + "\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, scaffold.Made]]:
    """A plug-in for every port, installed; its packages share no name."""
    root = tmp_path_factory.mktemp("plugins")
    made: dict[str, scaffold.Made] = {}
    paths = [str(root)]
    for port in registry.ports():
        made[port] = scaffold.plugin(port, f"{KEY}-{port}", root / port)
        install(root / port, root)
        paths.append(str(root / port / "src"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, before] if before else paths)
    sys.path[:0] = paths
    importlib.invalidate_caches()
    registry.methods.cache_clear()
    yield made
    sys.path[:] = [p for p in sys.path if p not in paths]
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    registry.methods.cache_clear()
    registry.load.cache_clear()


@pytest.mark.parametrize("port", registry.ports())
def test_template_conforms(port: str, plugins: dict[str, scaffold.Made]) -> None:
    results = [r for r in conformance.run(port, [f"{KEY}-{port}"]) if (port, r.check) not in ONLY_BASELINES]
    failed = [f"{r.check}: {r.message} ({r.where})" for r in results if not r.passed]
    assert results and not failed, failed


@pytest.mark.parametrize("port", registry.ports())
def test_what_is_made_says_what_the_protocol_asks(port: str, plugins: dict[str, scaffold.Made]) -> None:
    text = plugins[port].method.read_text()
    base = registry.base_class(port)
    for name, value in vars(base).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            assert f"def {name}(" in text, f"{name} is neither filled nor named"
    assert text.startswith(f'"""{KEY}-{port}: ') and not re.search(r"^(CLAIM|SWEEP)\b", text, re.M)
    assert registry.load(port, f"{KEY}-{port}").cls.__name__ == scaffold.class_name(f"{KEY}-{port}")


@pytest.mark.slow
def test_what_is_made_type_checks(plugins: dict[str, scaffold.Made]) -> None:
    home = registry.ROOT.parents[1]
    files = [str(made.method) for made in plugins.values()]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(home / "pyproject.toml"), *files],
        cwd=home,
        env=os.environ | {"MYPYPATH": os.pathsep.join(str(made.method.parents[1]) for made in plugins.values())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_test_that_is_made_can_fail(plugins: dict[str, scaffold.Made], monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "scaffolded"}
    exec(compile(plugins["schedule"].test.read_text(), plugins["schedule"].test, "exec"), space)
    space["test_it_is_found_and_conforms"]()
    monkeypatch.setattr(space[scaffold.class_name(f"{KEY}-schedule")], "scale", lambda *a: {})
    with pytest.raises(AssertionError, match="check_"):
        space["test_it_is_found_and_conforms"]()


@pytest.mark.parametrize("port", registry.ports())
def test_templates_meet_the_linter(port: str, plugins: dict[str, scaffold.Made]) -> None:
    made = plugins[port]
    for path in (made.method, made.test):
        assert "$" not in path.read_text(), f"{path} holds an unfilled placeholder"
        ast.parse(path.read_text())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--config",
            str(registry.ROOT.parents[1] / "pyproject.toml"),
            "--ignore",
            "I001",
            str(made.method),
            str(made.test),
        ],
        capture_output=True,
        text=True,
    )
    if "No module named ruff" in done.stderr:
        pytest.skip("ruff is not installed")
    assert done.returncode == 0, done.stdout


def test_in_checkout_writes_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = registry.port("schedule")
    monkeypatch.setattr(record, "checkout", lambda: tmp_path)
    moved = registry.PortInfo(info.name, info.summary, info.package, tmp_path / "schedules", info.baseline)
    moved.path.mkdir()
    for name in ("__init__.py", "cosine.py"):
        (moved.path / name).write_text((info.path / name).read_text())
    monkeypatch.setattr(registry, "port", lambda name: moved)
    registry.methods.cache_clear()
    made = scaffold.in_checkout("schedule", "my-line")
    assert made.method == tmp_path / "schedules" / "my_line.py" and made.module.endswith("schedules.my_line")
    assert made.test == tmp_path / "tests" / "train" / "test_my_line.py"
    assert "class MyLine(Schedule)" in made.method.read_text()
    assert f"from {made.module} import MyLine" in made.test.read_text()
    with pytest.raises(UserError, match="is there already"):
        scaffold.in_checkout("schedule", "my-line")
    registry.methods.cache_clear()


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a method's key"):
        scaffold.plugin("schedule", "My_Line", tmp_path / "a")
    with pytest.raises(UserError, match="is there already"):
        scaffold.plugin("schedule", "cosine", tmp_path / "a")
    with pytest.raises(UserError, match="unknown port 'shedule'"):
        scaffold.plugin("shedule", "x", tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        scaffold.plugin("schedule", "x", tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == [tmp_path / "b" / "file"]


@pytest.mark.parametrize(
    ("key", "name", "title"),
    [
        ("next-token", "next_token", "NextToken"),
        ("8bit", "m_8bit", "M8bit"),
        ("lambda", "m_lambda", "Lambda"),
        ("v1.5", "v1_5", "V15"),
    ],
)
def test_names(key: str, name: str, title: str) -> None:
    assert scaffold.python_name(key) == name and scaffold.class_name(key) == title
