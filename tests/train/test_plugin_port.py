"""A training port of another distribution takes part in runs, on the command line, with nothing changed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_toys import curated

PORT = '''"""port shrinkage: what pulls weights towards zero after each step."""

from __future__ import annotations

from typing import Any

from modicum.core.registry import Method
from modicum.core.callback import Callback

BASELINE = "none"


class Shrinkage(Method, Callback):
    conflicts = frozenset()

    def __init__(self, config: Any):
        self.config = config
'''
NONE = '''"""none: leaves weights alone."""

from dataclasses import dataclass

from shrinking.shrinkages import Shrinkage


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Nothing(Shrinkage):
    pass
'''
SCALE = '''"""scale: multiplies every weight."""

from dataclasses import dataclass

import torch

from shrinking.shrinkages import Shrinkage


@dataclass(frozen=True, kw_only=True)
class Config:
    by: float = 0.5


class Scale(Shrinkage):
    conflicts = frozenset({"fsdp", "surgery/spdf"})

    @torch.no_grad()
    def after_step(self, trainer):
        for weight in trainer.named.values():
            weight.mul_(self.config.by)
        trainer.write_back()
        self.steps = trainer.steps_done

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distribution with one port, as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "shrinking" / "shrinkages"
    package.mkdir(parents=True)
    (folder / "shrinking" / "__init__.py").write_text("")
    for name, text in (("__init__", PORT), ("none", NONE), ("scale", SCALE)):
        (package / f"{name}.py").write_text(text)
    info = folder / "shrinking-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shrinking\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modicum.ports]\ntrain/shrinkage = shrinking.shrinkages\n")
    return folder


def modicum(installed: Path, *words: object) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(installed), *filter(None, sys.path)])
    program = "from modicum.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        check=False,
    )


def test_it_is_listed_offered_and_run(installed: Path, tmp_path: Path) -> None:
    assert "scale" in modicum(installed, "ls", "shrinkage").stdout
    assert "--shrinkage" in modicum(installed, "pretrain", "--help").stdout
    folder = curated(tmp_path)
    words = [
        "--parameters",
        "60k",
        "--sequence-length",
        32,
        "--batch",
        128,
        "--lr",
        "1e-6",
        "--device",
        "cpu",
        "--json",
    ]
    runs = {}
    for choice in ("none", "scale:by=0.5"):
        out = tmp_path / choice[:5]
        done = modicum(
            installed, "pretrain", folder, "--out", out, "--steps", 3, "--shrinkage", choice, *words, "--json"
        )
        assert done.returncode == 0, done.stderr[-2000:]
        runs[choice] = json.loads(done.stdout)
    state = json.loads((Path(runs["scale:by=0.5"]["checkpoint"]) / "state.json").read_text())
    assert state["config"]["shrinkage"] == {"method": "scale", "by": 0.5} and state["parts"]["shrinkage"] == {
        "steps": 3
    }
    from modicum.model.folder import load_model

    plain, small = (load_model(run["folder"]) for run in runs.values())
    for (name, a), b in zip(plain.named_parameters(), small.parameters(), strict=True):
        assert (b.float() - a.float() / 8).norm() < 1e-2 * a.float().norm() / 8, name
    both = ["--steps", 3, "--surgery", "spdf", "--shrinkage", "scale"]
    refused = modicum(installed, "pretrain", folder, "--out", tmp_path / "x", *both)
    assert refused.returncode == 2 and "shrinkage 'scale'" in refused.stderr and "surgery 'spdf'" in refused.stderr
