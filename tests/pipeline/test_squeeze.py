"""The recipe squeeze at toy size: pruned, healed, distilled, quantised, exported, every link measured; and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pipeline_toys
import pytest
import torch

from modicum.compress.divergence import Score
from modicum.model import attach
from modicum.model.folder import load_config, load_model
from modicum.pipeline.recipe import load, parse
from modicum.pipeline.report import as_text
from modicum.pipeline.run import run_recipe
from modicum.pipeline.stages.compare import _change

MODULES = ("json", "textwrap", "heapq", "argparse", "random", "string", "shutil", "ast")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _figures(out: Path, name: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((out / "stages" / name / "done.json").read_text())["figures"]
    return figures


def test_differences_are_paired() -> None:
    """The same harder sequences in both models leave no error in their difference."""
    base = [Score(0.0, nats) for nats in (10.0, 50.0, 90.0)]
    worse = [Score(0.1, s.nats * 1.1) for s in base]
    sizes = [10, 50, 90]
    mean, error = _change(worse, base, sizes)
    assert mean == pytest.approx(0.1 / 0.6931472) and error == pytest.approx(0.0, abs=1e-12)
    assert _change(base[::-1], base, sizes)[1] > 0.1


def test_a_model_is_named_or_made_before() -> None:
    recipe = parse({"stages": [{"curate": {}}, {"compressor": {"model": "smollm2", "compressor": "rtn:bits=3"}}]})
    assert recipe.sources("compressor") == {"corpus": ["curate"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_squeeze_makes_every_link_and_goes_on(tmp_path: Path) -> None:
    text = pipeline_toys.corpus(tmp_path / "text", *MODULES)
    other = pipeline_toys.corpus(tmp_path / "other", "csv", "shlex", "difflib", "calendar")
    model = pipeline_toys.chat_model(tmp_path / "llama", [p.read_text() for p in text.iterdir()])
    overrides = [f"text.corpus={text}", f"other.corpus={other}", f"text.tokenizer={model}", "text.heldout=0.3"]
    overrides += ["other.heldout=0.3", f"pruned.model={model}", "pruned.compressor=shortgpt:drop=1"]
    for name in ("healed", "distilled"):
        overrides += [
            f"{name}.tokens=4ktok",
            f"{name}.sequence_length=64",
            f"{name}.batch_tokens=256",
            f"{name}.lr=5e-3",
        ]
    overrides += [f"distilled.distiller=distil-logit:teacher={model},alpha=0.9", f"compare.original={model}"]
    overrides += ["quantised.compressor=gptq:bits=4,group=32", "compare.sequences=4", "compare.length=64"]
    overrides += ["pruned.sequences=4", "pruned.length=64", "quantised.sequences=4", "quantised.length=64"]
    recipe = load("squeeze", overrides)
    run = run_recipe(recipe, tmp_path / "run", notify=lambda line: None)
    rows = {row["model"]: row for row in _figures(run.folder, "compare")["rows"]}
    assert list(rows) == ["original", "pruned", "healed", "distilled", "quantised", "gguf", "folder"]
    assert rows["original"]["kl"] == pytest.approx(0, abs=1e-3) and rows["original"]["change"]["text"][0] == 0
    assert set(rows["gguf"]["bits_per_byte"]) == {"text", "other"}
    assert rows["healed"]["bits_per_byte"]["text"] < rows["pruned"]["bits_per_byte"]["text"] - 0.05
    folders = {name: _figures(run.folder, name)["folder"] for name in rows if name != "original"}
    assert load_config(folders["pruned"]).layers == load_config(folders["distilled"]).layers == 1
    forms = attach.forms(load_model(folders["quantised"]))
    assert {form.choice.method for form in forms.values()} == {"int4", "int8"}  # type: ignore[union-attr]
    assert rows["quantised"]["bytes"] < 0.6 * rows["distilled"]["bytes"]
    assert not attach.forms(load_model(folders["folder"]))
    dense, packed = load_model(folders["folder"], "float32"), load_model(folders["quantised"], "float32")
    tokens = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens), packed(tokens), atol=0.05, rtol=0.05)
    assert abs(rows["gguf"]["kl"] - rows["folder"]["kl"]) < 0.05
    assert "quantised: " in as_text(run) and "Link by link" in (run.folder / "report.html").read_text()

    before = {
        name: (run.folder / "stages" / name / "done.json").stat().st_mtime_ns for name in rows if name != "original"
    }
    (run.folder / "stages" / "quantised" / "done.json").unlink()
    again = run_recipe(recipe, tmp_path / "run", notify=lambda line: None)
    after = {name: (again.folder / "stages" / name / "done.json").stat().st_mtime_ns for name in before}
    redone = {name for name in before if after[name] != before[name]}
    assert "quantised" in redone and not redone & {"pruned", "healed", "distilled"}
