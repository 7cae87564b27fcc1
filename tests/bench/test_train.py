"""`modicum bench train` on models of nothing: same losses, ratios to the fastest of the others, records, failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from modicum.bench import engine, train_columns
from modicum.bench import train as bench
from modicum.bench.engine_worker import Job
from modicum.core.errors import UserError

SIZE = train_columns.Size(
    models=("60k",), vocab=300, length=16, rows=4, micro=2, adapter_rows=2, adapter_micro=1, rounds=2
)
FAILING = """
def dies(folder, size, task):
    def work():
        raise RuntimeError("no such kernel")
    return {task: work}
"""


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's ceilings, which take seconds to measure and are not what is tested here."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda: {"matmul_bfloat16_flop_per_s": 1e10})


def test_everybody_trains_the_same(idle: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    engines = ["modicum", "modicum plain", "transformers", "peft"]
    result = bench.measure(SIZE, names=engines, more=[Job("broken", "failing:dies", ("60k",))])
    rows = {(r["engine"], r["column"]): r for r in result["rows"]}
    assert set(rows) == {(e, t) for e in engines[:2] for t in ("60k", "lora")} | {
        ("transformers", "60k"),
        ("peft", "lora"),
    }
    assert all(len(r["rates"]) == 2 and len(r["losses"]) == 3 for r in rows.values())
    first = {e: rows[e, "60k"]["losses"][0] for e in engines[:3]} | {"peft": rows["peft", "lora"]["losses"][0]}
    assert first["modicum"] == pytest.approx(first["transformers"], rel=2e-3)
    assert all(distance < 5e-3 for distance in bench.loss_distance(result).values())
    assert set(bench.loss_distance(result)) == {"60k", "lora"}
    ratio = rows["modicum", "60k"]["tokens_per_s"] / rows["transformers", "60k"]["tokens_per_s"]
    assert rows["modicum", "60k"]["ratio"] == pytest.approx(ratio)
    assert "no such kernel" in result["skipped"]["broken"]
    engine.append(result, tmp_path / "train.jsonl", 0, bench="train", base="others")
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == len(rows)


def test_who_trains_what() -> None:
    tasks = {job.engine: job.forms for job in bench.jobs(SIZE, bench.ENGINES, ("60k", "lora"))}
    assert tasks["peft"] == ("lora",) and tasks["modicum"] == ("60k", "lora") and tasks["transformers"] == ("60k",)
    assert {job.engine for job in bench.jobs(SIZE, bench.ENGINES, ("lora",))} == {"modicum", "modicum plain", "peft"}


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UserError, match="transformers compiled"):
        bench.measure(SIZE, names=["deepspeed"])
