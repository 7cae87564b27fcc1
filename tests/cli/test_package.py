"""The wheel: it holds every file of the package, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-800:]
    return next(out.glob("modicum-*-py3-none-any.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "src" / "modicum"
    want = {
        f"modicum/{p.relative_to(package).as_posix()}"
        for p in package.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    held = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("modicum/")}
    assert held == want
    for name in ("modicum/py.typed", "modicum/pipeline/recipes/quickstart.yaml", "modicum/serve/native/step.c"):
        assert name in held


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
assert all((p.path / "_template.py.txt").is_file() for p in registry.ports().values() if p.name == "optimizer")
sys.argv[1:] = ["ls", "recipes"]
main()
"""
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.startswith("playground-recall")
