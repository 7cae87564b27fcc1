"""Evidence records and their comparison."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats as scipy_stats

from modicum.bench import record, stats
from modicum.bench.record import Record
from modicum.core.errors import CorruptError, UserError

AXES = {
    "quality": {"metric": "loss", "better": "lower", "unit": ""},
    "cost": {"metric": "state_bytes", "better": "lower", "unit": "bytes"},
}


def make(method: str = "a", seed: int = 0, loss: float = 2.0, cost: float = 100.0, **more: Any) -> Record:
    fields: dict[str, Any] = {
        "port": "optimizer",
        "method": method,
        "choice": method,
        "knobs": {},
        "baseline": "base",
        "seed": seed,
        "run": "r1",
        "scale": {"tokens": 10},
        "budget": {},
        "model": {"name": "m", "checksum": "c"},
        "data": {"name": "d", "checksum": "e"},
        "metrics": {"loss": loss, "state_bytes": cost},
        "seconds": 1.5,
        "peak_bytes": 10.0,
        "flops": 5.0,
        "axes": AXES,
        "machine": {"cpu": "x", "cores": 2, "threads": 1, "memory_bytes": 2**30, "gpus": []},
        "versions": {"torch": "2"},
        "commit": "abc",
        "time": "2026-01-01T00:00:00+00:00",
    }
    return Record(**fields | more)


def test_round_trip_and_later_ones_count(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.jsonl"
    first, second, again = make(loss=2.0), make(seed=1), make(loss=1.0)
    for entry in (first, second, again):
        record.append(path, entry)
    assert record.read(path) == [second, again]
    assert len(path.read_text().splitlines()) == 3


def test_other_knobs_are_another_record(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    record.append(path, make(knobs={"rank": 4}))
    record.append(path, make(knobs={"rank": 8}))
    assert [r.knobs["rank"] for r in record.read(path)] == [4, 8]


def test_a_torn_line_is_left_out_and_the_next_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    record.append(path, make())
    path.write_bytes(path.read_bytes() + b'{"port": "opt')
    assert record.read(path) == [make()]
    record.append(path, make(seed=1))
    assert record.read(path) == [make(), make(seed=1)]


def test_numpy_and_torch_numbers_are_plain(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "x.jsonl"
    record.append(path, make(metrics={"loss": np.float32(0.5), "state_bytes": 3}))
    assert json.loads(path.read_text())["metrics"]["loss"] == 0.5


def test_foreign_lines_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(CorruptError, match=r"x\.jsonl:1 is not an evidence record"):
        record.read(path)
    path.write_text(json.dumps(dataclasses.asdict(make()) | {"schema": 99}) + "\n")
    with pytest.raises(CorruptError, match="schema 99"):
        record.read(path)
    with pytest.raises(UserError, match="is a file"):
        record.folder(path)


def test_where_and_what() -> None:
    machine = record.machine()
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**28 and machine["threads"] >= 1
    import platform

    assert platform.node() not in json.dumps(machine) or not platform.node(), "the host's name is nobody's business"
    assert record.versions()["torch"].startswith("2")
    assert len(record.commit()) >= 8


def test_paired_difference_is_students() -> None:
    rng = random.Random(0)
    base = {seed: rng.gauss(2.0, 0.5) for seed in range(6)}
    method = {seed: value - 0.1 + rng.gauss(0, 0.02) for seed, value in base.items()}
    found = stats.paired(method | {99: 5.0}, base)  # a seed without its partner says nothing
    assert found is not None and found.n == 6
    differences = [method[s] - base[s] for s in base]
    wanted = scipy_stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert found.low == pytest.approx(wanted.low) and found.high == pytest.approx(wanted.high)
    assert found.clear and found.mean == pytest.approx(sum(differences) / 6)
    unpaired = scipy_stats.ttest_ind(list(method.values()), list(base.values())).confidence_interval(0.95)
    assert found.high - found.low < 0.2 * (unpaired.high - unpaired.low), "pairing should sharpen the interval"


def test_quantile_is_students() -> None:
    from scipy.stats import t

    for freedom in (1, 2, 5, 10, 11, 15, 40, 1000):
        assert stats.student_975(freedom) == pytest.approx(float(t.ppf(0.975, freedom)), abs=2e-4)


def test_one_seed_has_no_interval_and_no_seed_no_difference() -> None:
    found = stats.paired({0: 1.0}, {0: 2.0})
    assert found is not None and (found.mean, found.low, found.clear) == (-1.0, None, False)
    assert stats.paired({0: 1.0}, {1: 2.0}) is None


def test_compare_puts_the_baseline_first_and_tells_better_from_worse() -> None:
    records = []
    for seed in range(3):
        records += [
            make("better", seed, 1.0 + seed / 100, 50.0),
            make("base", seed, 2.0 + seed / 50, 100.0),
            make("worse", seed, 3.0 + seed / 40, 100.0),
            make("same", seed, 2.0 + (seed % 2) / 10, 25.0),
        ]
    (rows,) = stats.compare(records)
    assert [r.choice for r in rows] == ["base", "better", "worse", "same"]
    assert [r.better for r in rows] == [None, True, False, None]
    assert rows[1].cost_ratio == pytest.approx(0.5) and rows[1].quality.n == 3
    assert rows[1].quality_ratio == pytest.approx(1.01 / 2.02)
    assert rows[0].is_baseline and rows[0].difference is None


def test_higher_is_better_turns_the_verdict() -> None:
    axes = {"quality": AXES["quality"] | {"better": "higher"}, "cost": AXES["cost"]}
    records = [make(m, s, v + s / 100, axes=axes) for m, v in (("base", 1.0), ("up", 2.0)) for s in range(3)]
    assert [r.better for r in stats.compare(records)[0]] == [None, True]


def test_methods_with_other_axes_are_compared_apart_with_the_baseline_in_both() -> None:
    other = {"quality": {"metric": "adapted", "better": "lower", "unit": ""}, "cost": AXES["cost"]}
    both = {"loss": 2.0, "adapted": 1.0, "state_bytes": 8.0}
    records = [make("base", s, metrics=both) for s in range(2)] + [make("store", s, 2.5) for s in range(2)]
    records += [make("adapt", s, metrics=both | {"adapted": 1.5}, axes=other) for s in range(2)]
    first, second = stats.compare(records)
    assert [r.choice for r in first] == ["base", "store"] and first[0].quality.mean == 2.0
    assert [r.choice for r in second] == ["base", "adapt"] and second[0].quality.mean == 1.0
    assert second[1].difference is not None and second[1].difference.mean == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00012345, "0.0001234"), (1234.5, "1234"), (25_000, "25k"), (3.2e9, "3.2G"), (math.inf, "inf")],
)
def test_numbers(value: float, text: str) -> None:
    assert stats.number(value) == text
