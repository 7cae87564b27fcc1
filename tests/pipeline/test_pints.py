"""The recipe pints: its original's schedule at full scale, and all of it at toy size."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from modicum.core import registry
from modicum.pipeline.named import find
from modicum.pipeline.recipe import load
from modicum.pipeline.run import run_recipe
from modicum.pipeline.training import train_config

STEPS, WARMUP, BATCH, PEAK, FLOOR, CORPUS = 96_180, 2_000, 512 * 2_048, 4e-4, 4e-5, 57e9  # of the original's README


def full_scale() -> list[str]:
    """The overrides that the recipe's comment gives."""
    text = find("pints").read_text()
    comment = " ".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    return [item.replace('"', "") for item in re.findall(r'on-expository\.[\w]+=(?:"[^"]+"|\S+)', comment)]


def test_the_original_s_schedule_at_full_scale() -> None:
    recipe = load("pints", full_scale())
    section = recipe.section("on-expository")
    config = train_config(section, None, section.tokens, 0)
    assert config.total_steps == STEPS and config.step_tokens == BATCH and config.sequences == 512
    assert round(config.total_tokens / 1e9) == 101 and config.total_tokens / CORPUS == pytest.approx(1.77, abs=0.01)
    assert config.lr == PEAK and config.clip == 1.0
    optimizer = config.choice("optimizer").config()
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    schedule = registry.build("schedule", config.choice("schedule"))
    for step in (500, 2_000, 20_000, 60_000, 96_180):
        x = (step - WARMUP) / (STEPS - WARMUP)
        right = PEAK * step / WARMUP if step < WARMUP else FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * x)) / 2
        assert config.lr * schedule.scale(step * BATCH, STEPS * BATCH)["lr"] == pytest.approx(right, rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pints_from_text_to_a_tuned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny = ["shape=[32, 1]", "tokens=8ktok", "sequence_length=64", "batch_tokens=256"]
    overrides = [f"{name}.{knob}" for name in ("on-pool", "on-random", "on-expository") for knob in tiny]
    overrides += [f"{name}.max_bytes=1MiB" for name in ("pool", "random", "expository")]
    overrides += ["pool.vocab_size=600", "pretrained.bytes=4kB", "evaluate.bytes=4kB", "evaluate.sequence_length=64"]
    overrides += ["tuned.tokens=2ktok", "tuned.batch_tokens=512", "tuned.sequence_length=128", "tuned.pairs=40"]
    overrides += ["tuned.heldout_pairs=8", "tuned.form=lora:rank=2", "budget.time=1h", "reference.max_bytes=600kB"]
    run = run_recipe(load("pints", overrides), tmp_path / "run", notify=lambda line: None)
    rows = json.loads((run.folder / "stages/pretrained/done.json").read_text())["figures"]["rows"]
    assert {(r["model"], r["corpus"]) for r in rows} == {
        (m, c) for m in ("on-pool", "on-random", "on-expository") for c in ("reference", "pool")
    }
    assert (run.folder / "stages/evaluate/done.json").is_file()
    text = (run.folder / "report.html").read_text()
    assert "not-selected" in text and "dclm" in text
