"""A stage of another distribution: found by its entry point, used from a recipe and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pipeline_toys
import pytest

STAGE = '''"""vocabulary: the most frequent words of a corpus."""

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
'''
BLOCK = (
    '<h2 id="{{ name }}">Words</h2><ol>{% for word, n in figures.words %}<li>{{ word }} × {{ n }}</li>{% endfor %}</ol>'
)
RECIPE = """corpus: {corpus}
stages:
- curate: {{vocab_size: 300, heldout: 0.3, steps: [normalise]}}
- vocabulary: {{top: 4}}
  as: words
"""


@pytest.fixture
def modicum(tmp_path: Path):
    """The command with the distribution installed beside it: a package, and entry points in a .dist-info."""
    (tmp_path / "site" / "wordy").mkdir(parents=True)
    (tmp_path / "site" / "wordy" / "__init__.py").write_text("")
    (tmp_path / "site" / "wordy" / "vocabulary.py").write_text(STAGE)
    (tmp_path / "site" / "wordy" / "vocabulary.html").write_text(BLOCK)
    info = tmp_path / "site" / "wordy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wordy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modicum.stages]\nvocabulary = wordy.vocabulary\n")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "modicum.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return typed


@pytest.mark.timeout(400)
def test_a_stage_of_another_distribution_is_shown_planned_run_skipped_and_reported(tmp_path: Path, modicum) -> None:
    corpus = pipeline_toys.corpus(tmp_path / "notes", "json", "textwrap", "heapq", "string", "bisect")
    recipe, out = tmp_path / "words.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.format(corpus=corpus))
    shown = modicum("show", "stage/vocabulary").stdout
    assert "vocabulary: the most frequent words of a corpus" in shown and "top  int = 5    words listed" in shown
    done = modicum("run", str(recipe), "words.top=3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "stages" / "words" / "done.json").read_text())
    assert len(found["figures"]["words"]) == 3 and "words: " in done.stdout
    assert "Words</h2>" in (out / "report.html").read_text()
    assert "words" in json.loads((out / "plan.json").read_text())["stages"]
    again = modicum("run", str(recipe), "words.top=3", "--out", str(out), "--json")
    assert "words: done already" in again.stderr and json.loads(again.stdout)["figures"]["words"]["words"]
    wrong = modicum("run", str(recipe), "words.tops=2", "--out", str(out))
    assert wrong.returncode == 2 and "Did you mean 'words.top'" in wrong.stderr


def test_without_the_distribution_the_recipe_is_refused(tmp_path: Path) -> None:
    from modicum.core.errors import UserError
    from modicum.pipeline.recipe import load

    (tmp_path / "words.yaml").write_text(RECIPE.format(corpus=tmp_path))
    with pytest.raises(UserError, match=r"'vocabulary'.*modicum ls stages"):
        load(tmp_path / "words.yaml")
