"""The compress stage: a form that asks for calibration data gets the corpus, in the run and in its plan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pipeline_toys
import pytest

from modicum.data.curate import CurateConfig, curate
from modicum.pipeline.recipe import parse
from modicum.pipeline.stage import Input, Inputs, load_stage

FORM = '''"""scaled8: int8 whose scales follow the calibration data.

For a test: Nobody 2026.
"""

from dataclasses import dataclass
from pathlib import Path
from modicum.model.linear.int8 import Config as Int8Config
from modicum.model.linear.int8 import Int8


@dataclass(frozen=True, kw_only=True)
class Config(Int8Config):
    pass


class Scaled8(Int8):
    provides = frozenset({"adapter_base", "calibration", "embedding", "fit", "merge"})

    def take(self, weight_OI, calibration_NI, generator):
        rows = 0 if calibration_NI is None else len(calibration_NI)
        with open(Path(__file__).with_name("seen.txt"), "a") as file:
            print(*weight_OI.shape, rows, file=file)
        super().take(weight_OI, calibration_NI, generator)
'''


@pytest.fixture
def form(install_plugin) -> Path:
    return install_plugin("modicum.methods:linear/scaled8", "scaled_eight", FORM) / "seen.txt"


def test_a_form_that_is_calibrated_sees_the_corpus(tmp_path: Path, form: Path) -> None:
    notes = pipeline_toys.corpus(tmp_path / "notes", "json", "textwrap", "heapq")
    made = curate([str(notes)], tmp_path / "curated", CurateConfig(steps=["normalise"], vocab_size=400), processes=1)
    model = pipeline_toys.chat_model(tmp_path / "llama", [p.read_text() for p in notes.iterdir()])
    recipe = parse({"compress": {"forms": ["scaled8", "int8"]}})
    stage = load_stage("compress")
    inputs = Inputs(
        {
            "corpus": [Input("curate", recipe.section("curate"), {"folder": str(made.folder)})],
            "model": [Input("adapt", recipe.section("adapt"), {"folder": str(model)})],
        }
    )
    context = SimpleNamespace(folder=tmp_path / "out", events=None, recipe=recipe, name="compress")
    figures = stage.run(recipe.section("compress"), inputs, context)
    seen = [list(map(int, line.split())) for line in form.read_text().splitlines()]
    assert len(seen) == 15  # seven matrices of two layers, and the embedding
    assert all(rows > 100 for out, _, rows in seen if out != 640)  # of every linear layer
    assert [Path(v["folder"]).name for v in figures["variants"][1:]] == ["scaled8", "int8"]
    assert figures["variants"][1]["bytes"] == pytest.approx(figures["variants"][2]["bytes"], rel=0.01)


def test_two_settings_of_a_form_do_not_share_a_folder(tmp_path: Path) -> None:
    notes = pipeline_toys.corpus(tmp_path / "notes", "heapq")
    model = pipeline_toys.chat_model(tmp_path / "llama", [p.read_text() for p in notes.iterdir()])
    recipe = parse({"compress": {"forms": ["int4:group=32", "int4:group=16"]}})
    given = Input("adapt", recipe.section("adapt"), {"folder": str(model)})
    context = SimpleNamespace(folder=tmp_path / "out", events=None, recipe=recipe, name="compress")
    inputs = Inputs({"corpus": [Input("curate", recipe.section("curate"), {"folder": ""})], "model": [given]})
    found = load_stage("compress").run(recipe.section("compress"), inputs, context)["variants"]
    assert len({v["folder"] for v in found}) == 3 and found[1]["bytes"] < found[2]["bytes"]
