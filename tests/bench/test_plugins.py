"""One distribution brings a training port with its bench, a stage, a KV policy and a data transform.

Each is used from the command line, from a recipe and from a bench, and nothing of modicum is touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pipeline_toys
import pytest

FILES = {
    "shrinkages/__init__.py": '''"""port shrinkage: what pulls weights towards zero after each step."""

from modicum.core.registry import Method
from modicum.core.callback import Callback

BASELINE = "none"


class Shrinkage(Method, Callback):
    conflicts = frozenset()

    def __init__(self, config):
        self.config = config
''',
    "shrinkages/none.py": '''"""none: leaves weights alone."""

from dataclasses import dataclass

from brought.shrinkages import Shrinkage


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Nothing(Shrinkage):
    pass
''',
    "shrinkages/scale.py": '''"""scale: multiplies every weight."""

from dataclasses import dataclass

import torch

from brought.shrinkages import Shrinkage

SWEEP = {"by": (0.999,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    by: float = 0.5


class Scale(Shrinkage):
    @torch.no_grad()
    def after_step(self, trainer):
        for weight in trainer.named.values():
            weight.mul_(self.config.by)
''',
    "shrinkages/_bench.py": '''"""shrinkage: held-out bits per byte after equal tokens, against their seconds."""

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement

AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("train_seconds", "lower", "s"))
Scale = training.Scale
QUICK = Scale(**training.QUICK)


def measure(choice, seed, settings):
    bench = training.Bench.of(settings)
    model = bench.model(seed)
    result = bench.train(model, seed, shrinkage=choice)
    metrics = {"bits_per_byte": bench.bits(model), "train_seconds": result.seconds}
    return Measurement(metrics=metrics, model=bench.model_record(model), data=bench.corpus.record)
''',
    "newest.py": '''"""newest: keep the latest entries of the prompt, all that is generated stays."""

from dataclasses import dataclass

from modicum.serve.kv import ScorePolicy, check_budget


@dataclass(frozen=True, kw_only=True)
class Config:
    budget: float = 0.5

    def __post_init__(self):
        check_budget("newest", self.budget)


class Newest(ScorePolicy):
    def score(self, layer, q_HWE, k_GSE, v_GSE):
        return k_GSE.new_ones(k_GSE.shape[:2]).cumsum(-1)
''',
    "halves.py": '''"""halves: only the second half of each document's chunk is learnt."""

from dataclasses import dataclass

from modicum.data.batch import NO_LOSS
from modicum.data.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class Config:
    share: float = 0.5


class Halves(Transform):
    def apply(self, tokens, span, at):
        targets_N = tokens.targets_N.copy()
        targets_N[: int(self.config.share * len(targets_N))] = NO_LOSS
        return tokens._replace(targets_N=targets_N)
''',
    "vocabulary.py": '''"""vocabulary: the most frequent words of a corpus."""

from collections import Counter

from modicum.data.curate import Curation
from modicum.pipeline.section import Strict
from modicum.pipeline.stage import Report, Stage


class Section(Strict):
    top: int = 5  # words listed


class Vocabulary(Stage[Section]):
    needs, gives = ("corpus",), ("words",)

    def run(self, section, inputs, context):
        documents = Curation.load(inputs["corpus"]["folder"]).documents("train")
        counts = Counter(word for document in documents for word in document.text.split())
        return {"words": counts.most_common(section.top)}

    def report(self, done):
        return Report(lines=[f"{done.name}: " + " ".join(word for word, _ in done.figures["words"])])
''',
}
ENTRIES = """[modicum.ports]
train/shrinkage = brought.shrinkages
[modicum.methods]
kv/newest = brought.newest
transform/halves = brought.halves
[modicum.stages]
vocabulary = brought.vocabulary
"""
RECIPE = """corpus: {corpus}
stages:
- curate: {{vocab_size: 300, heldout: 0.3, steps: [normalise]}}
- vocabulary: {{top: 4}}
- pretrain: {{shape: [32, 1], tokens: 4ktok, sequence_length: 64, batch_tokens: 256, dtype: fp32,
             shrinkage: {{method: scale, by: 0.9}}, transform: halves}}
- evaluate: {{bytes: 2kB, sequence_length: 64, engine: {{kv: {{method: newest, budget: 0.5}}}}}}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution as pip leaves it: its package, and its entry points in a .dist-info."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in {"__init__.py": "", **FILES}.items():
        path = folder / "brought" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = folder / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    return folder


def modicum(site: Path, *commands: list[str]) -> str:
    """What one process prints that runs the commands one after the other."""
    program = """
import json, sys
from modicum.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""
    paths = os.pathsep.join([str(site), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    words = [sys.executable, "-c", program, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_kv_policy_is_short() -> None:
    assert len(FILES["newest.py"].splitlines()) <= 20


def test_each_is_shown_and_measured_from_the_command_line(site: Path, tmp_path: Path) -> None:
    evidence = ["--quick", "--seeds", "0", "--evidence", str(tmp_path), "--plot", str(tmp_path / "plot.html")]
    printed = modicum(
        site,
        ["ls"],
        ["show", "stage/vocabulary"],
        ["bench", "shrinkage", *evidence],
        ["bench", "kv", "newest:budget=0.5", *evidence],
        ["bench", "transform", "halves", *evidence],
        ["bench", "shrinkage", "--list", "--missing", *evidence],
    )
    for words in ("shrinkage: what pulls weights", "newest", "halves", "top  int = 5    words listed"):
        assert words in printed
    assert "shrinkage: nothing to measure" in printed
    found = {}
    for path in sorted(tmp_path.glob("*/*.jsonl")):
        found[path.parent.name, path.stem] = json.loads(path.read_text().splitlines()[-1])
    scaled, plain = (found["shrinkage", key]["metrics"]["bits_per_byte"] for key in ("scale", "none"))
    assert found["shrinkage", "scale"]["choice"] == "scale:by=0.999" and scaled != plain
    assert found["kv", "newest"]["metrics"]["held_bytes"] < found["kv", "full"]["metrics"]["held_bytes"]
    assert (
        found["transform", "halves"]["metrics"]["bits_per_byte"]
        > found["transform", "none"]["metrics"]["bits_per_byte"]
    )
    assert all(record["code"] for record in found.values())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_of_them_in_one_recipe(site: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "brought.yaml", tmp_path / "run"
    recipe.write_text(
        RECIPE.format(corpus=pipeline_toys.corpus(tmp_path / "notes", "json", "textwrap", "heapq", "string"))
    )
    printed = modicum(site, ["run", str(recipe), "--out", str(out)])
    assert "vocabulary: " in printed
    done = {name: json.loads((out / "stages" / name / "done.json").read_text()) for name in ("vocabulary", "pretrain")}
    assert len(done["vocabulary"]["figures"]["words"]) == 4
    (state,) = (out / "stages" / "pretrain").rglob("state.json")
    config = json.loads(state.read_text())["config"]
    assert config["shrinkage"] == {"method": "scale", "by": 0.9} and "halves" in json.dumps(config["transform"])
