"""What compressing costs is measured on the same text, and what would cost less is measured too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modicum.core.errors import UserError
from modicum.evaluate import quantization
from modicum.evaluate.lm import summarise


def scores(nats: list[float], each: int = 100):
    return summarise([(n, each, 10) for n in nats], resamples=50)


def test_the_change_is_the_paired_ratio_of_all_bits() -> None:
    before, after = scores([50.0, 60.0, 70.0, 40.0]), scores([55.0, 66.0, 77.0, 44.0])
    found = quantization.effect("int4", before, after, 4.5)
    assert found.change == pytest.approx(0.1) and found.hurts
    assert found.before == pytest.approx(220 / 400 / np.log(2))
    assert 0 <= found.stderr < 0.1, "every document got worse by a tenth: pairing leaves little doubt"


def test_chance_and_small_losses_pass_without_a_warning() -> None:
    noisy = quantization.effect("int4", scores([50.0, 60.0, 70.0, 40.0]), scores([30.0, 90.0, 60.0, 52.0]), 4.5)
    assert noisy.change > quantization.TOLERATED and not noisy.hurts, "one document decides: nothing can be said"
    small = quantization.effect("int8", scores([50.0, 60.0]), scores([50.5, 60.6]), 8.0)
    assert 0 < small.change < quantization.TOLERATED and not small.hurts


def test_advice_names_the_loss_and_what_was_measured_to_lose_less() -> None:
    worse = quantization.Effect("int4:group=64", 1.0, 1.2, 0.2, 0.01, 4.5)
    other = quantization.Effect("int8", 1.0, 1.001, 0.001, 0.0, 8.1)
    lines = quantization.advice(worse, [other])
    assert "+20.0%" in lines[0] and "--form int8: +0.1% at 8.10 bits" in lines[1]


def test_a_sample_is_the_same_each_time_and_needs_text(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i} " * 200)
    first = quantization.sample(str(folder))
    assert first == quantization.sample(str(folder)) and len(first) == quantization.DOCUMENTS
    assert all(len(t) <= quantization.CHARACTERS for t in first)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("a few words")
    with pytest.raises(UserError, match="no document of"):
        quantization.sample(str(tmp_path / "short"))
