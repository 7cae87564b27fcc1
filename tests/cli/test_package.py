"""The wheel: it holds every file of the package, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("hatchling")


def build(target: str, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    return next(out.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def package_files() -> set[str]:
    package = ROOT / "src" / "modicum"
    found = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {f"modicum/{p.relative_to(package).as_posix()}" for p in found}


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("modicum/")}
    assert inside == package_files()
    for name in ("modicum/py.typed", "modicum/pipeline/recipes/quickstart.yaml", "modicum/serve/native/step.c"):
        assert name in inside


def test_so_does_the_sdist_from_which_build_makes_the_wheel(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {f"src/{name}" for name in package_files()} <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "constraints.txt", "Makefile", ".importlinter"} <= names


def test_it_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import modicum, sys
from modicum.cli import main
from modicum.pipeline.recipe import load
from modicum.core import registry
assert modicum.__file__.startswith(sys.argv[1]), modicum.__file__
assert load("quickstart").name == "quickstart"
from modicum.bench import overview, scaffold
assert overview.PAGE.is_file() and "class My(Optimizer)" in scaffold.render(registry.port("optimizer"), "my", "my")[0]
sys.argv[1:] = ["ls", "recipes"]
main()
"""
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-800:]
    assert {"continued", "playground-recall", "qlora", "quickstart"} <= {
        line.split(" ")[0] for line in done.stdout.splitlines()
    }
