"""The recipes continued, qlora and edu-lora at toy size: every stage for real, over a few files and random models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pipeline_toys
import pytest

from modicum.core.errors import UserError
from modicum.model import attach
from modicum.model.folder import load_model
from modicum.pipeline.recipe import load, parse
from modicum.pipeline.report import as_text
from modicum.pipeline.run import run_recipe

MODULES = ("json", "textwrap", "heapq", "argparse", "random", "string", "shutil", "ast")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _figures(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "stages" / name / "done.json").read_text())["figures"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_continued_goes_on_with_new_data_and_scores_old_and_new(tmp_path: Path) -> None:
    old = pipeline_toys.corpus(tmp_path / "old", *MODULES)
    new = tmp_path / "new"
    new.mkdir()
    rng = random.Random(0)
    for i in range(60):  # another language than Python's documentation
        words = (rng.choice(("heron", "water", "reed", "wading", "slow", "grey", "fish", "lake")) for _ in range(150))
        (new / f"{i:02}.txt").write_text(f"{i} " + " ".join(words))
    tiny = ["shape=[32, 1]", "tokens=8ktok", "sequence_length=64", "batch_tokens=256"]
    overrides = [f"{name}.{knob}" for name in ("cosine", "rewarmed", "constant", "resumed") for knob in tiny]
    overrides += [
        f"old.corpus={old}",
        f"new.corpus={new}",
        "old.vocab_size=400",
        "old.heldout=0.3",
        "new.heldout=0.3",
        "new.steps=[normalise]",
    ]
    recipe = load("continued", [*overrides, "score.bytes=4kB", "old.max_bytes=null", "new.max_bytes=null"])
    run = run_recipe(recipe, tmp_path / "run", notify=lambda line: None)
    rows = {(r["model"], r["corpus"]): r for r in _figures(run.folder, "score")["rows"]}
    assert set(rows) == {(m, c) for m in ("cosine", "rewarmed", "constant", "resumed") for c in ("old", "new")}
    for before, after in (("cosine", "rewarmed"), ("constant", "resumed")):  # the new text is learnt
        assert rows[after, "new"]["bits_per_byte"] < rows[before, "new"]["bits_per_byte"] - 0.1
    assert rows["cosine", "old"]["change"] == 0 and rows["rewarmed", "new"]["change"] < 0
    assert _figures(run.folder, "rewarmed")["description"].count("went on from cosine") == 1
    assert "cosine: " in as_text(run) and "Scores" in (run.folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_qlora_adapts_over_a_quantised_base_and_evaluates_it(tmp_path: Path) -> None:
    notes = pipeline_toys.corpus(tmp_path / "notes", *MODULES)
    texts = [p.read_text() for p in notes.iterdir()]
    model = pipeline_toys.chat_model(tmp_path / "llama", texts)
    overrides = [f"corpus={notes}", f"adapt.model={model}", "curate.heldout=0.3", "curate.vocab_size=400"]
    overrides += ["adapt.tokens=4ktok", "adapt.sequence_length=128", "adapt.batch_tokens=512", "adapt.pairs=60"]
    overrides += ["adapt.heldout_pairs=8", "evaluate.bytes=4kB", "adapt.lr=2e-2"]
    run = run_recipe(load("qlora", overrides), tmp_path / "run", notify=lambda line: None)
    adapted = _figures(run.folder, "adapt")
    assert adapted["after"] < adapted["before"]
    forms = attach.forms(load_model(adapted["folder"]))
    assert {form.choice.method for form in forms.values()} == {"lora"}
    assert {form.base.choice.method for form in forms.values()} == {"int4"}  # the base stays in four bits
    before, after = _figures(run.folder, "evaluate")["variants"]
    assert (before["role"], after["role"]) == ("before", "answers")
    assert after["tokens"] == before["tokens"] and after["bits_per_byte"] != before["bits_per_byte"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_edu_lora_hands_an_adapter_over_and_asks_both_questions(tmp_path: Path) -> None:
    notes = pipeline_toys.corpus(tmp_path / "notes", *MODULES)
    model = pipeline_toys.chat_model(tmp_path / "llama", [p.read_text() for p in notes.iterdir()])
    overrides = [f"corpus={notes}", f"first.model={model}", f"whole.model={model}"]
    overrides += ["curate.heldout=0.3", "curate.vocab_size=400", "ground.encoder=lsa:dims=32"]
    tiny = ["sequence_length=128", "batch_tokens=512", "pairs=60", "heldout_pairs=8", "lr=2e-2"]
    overrides += [f"{name}.{knob}" for name in ("first", "second", "whole") for knob in tiny]
    overrides += ["first.tokens=2ktok", "second.tokens=2ktok", "whole.tokens=4ktok"]
    overrides += [f"{name}.{knob}" for name in ("two-sittings", "one-sitting") for knob in ("bytes=4kB", "questions=6")]
    run = run_recipe(load("edu-lora", overrides), tmp_path / "run", notify=lambda line: None)
    first, second, whole = (_figures(run.folder, name) for name in ("first", "second", "whole"))
    assert second["before"] == first["after"] and second["base"] == first["base"]
    assert second["after"] < second["before"] < first["before"] == whole["before"]
    assert {f.base.choice.method for f in attach.forms(load_model(second["folder"])).values()} == {"int4"}
    for name in ("two-sittings", "one-sitting"):
        graded = _figures(run.folder, name)["graded"]
        assert graded, graded


def test_an_adapter_that_goes_on_needs_a_stage_that_gives_one() -> None:
    stages = [{"curate": {}}, {"adapt": {"model": "m", "form": "svfit"}, "as": "first"}]
    wrong = {"adapt": {"from": "first", "go_on": True}, "as": "second"}
    with pytest.raises(UserError, match="has none"):
        parse({"corpus": "python", "stages": [*stages, wrong]})
    with pytest.raises(UserError, match="leave model out"):
        parse(
            {
                "corpus": "python",
                "stages": [*stages, {"adapt": {"from": "first", "go_on": True, "model": "m"}, "as": "b"}],
            }
        )
