"""Evidence records and their comparison."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats as scipy_stats

from modicum.bench import labs, record, stats
from modicum.bench.labs import Lab
from modicum.bench.record import Record
from modicum.core.errors import CorruptError, UserError

AXES = {
    "quality": {"metric": "loss", "better": "lower", "unit": ""},
    "cost": {"metric": "state_bytes", "better": "lower", "unit": "bytes"},
}


def lab(name: str = "r1", **more: Any) -> Lab:
    fields: dict[str, Any] = {
        "port": "optimizer",
        "tier": "laptop",
        "device": "cpu",
        "bench": "b",
        "scale": {"tokens": 10},
        "budget": {},
        "inputs": {"data": {"name": "d", "checksum": "e"}},
    }
    return Lab(id=name, **fields | more)


def make(method: str = "a", seed: int = 0, loss: float = 2.0, cost: float = 100.0, **more: Any) -> Record:
    fields: dict[str, Any] = {
        "lab": lab(),
        "method": method,
        "choice": method,
        "knobs": {},
        "baseline": "base",
        "seed": seed,
        "code": "c0de",
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
    first, second, again = make(loss=2.0), make(seed=1), make(loss=1.0)
    for entry in (first, second, again):
        path = record.append(tmp_path, entry)
    assert path == tmp_path / "optimizer" / "a.jsonl" and len(path.read_text().splitlines()) == 3
    assert record.read(tmp_path, "optimizer") == [second, again] and record.read(tmp_path, "kv") == []


def test_other_knobs_are_another_record(tmp_path: Path) -> None:
    record.append(tmp_path, make(knobs={"rank": 4}))
    record.append(tmp_path, make(knobs={"rank": 8}))
    assert [r.knobs["rank"] for r in record.read(tmp_path, "optimizer")] == [4, 8]


def test_settings_are_said_once_and_joined(tmp_path: Path) -> None:
    other = make("b", machine={"cpu": "y", "cores": 8}, model={"name": "m", "checksum": "z"})
    for entry in (make(seed=0), make(seed=1), other):
        record.append(tmp_path, entry)
    lines = [line for path in tmp_path.glob("optimizer/*.jsonl") for line in path.read_text().splitlines()]
    assert not any('"tokens"' in line or '"cpu"' in line or '"better"' in line for line in lines)
    (path,) = (tmp_path / "labs").iterdir()
    assert path.read_text().count('"memory_bytes"') == 1 and path.read_text().count('"tokens"') == 1
    assert record.read(tmp_path, "optimizer") == [make(seed=0), make(seed=1), other]
    path.write_text(path.read_text().replace(json.loads(lines[0])["machine"], "0" * 8))
    with pytest.raises(CorruptError, match="lacks what it refers to"):
        record.read(tmp_path, "optimizer")
    path.unlink()
    with pytest.raises(CorruptError, match=r"r1\.json is missing"):
        record.read(tmp_path, "optimizer")


def test_a_torn_line_is_left_out_and_the_next_one_whole(tmp_path: Path) -> None:
    path = record.append(tmp_path, make())
    path.write_bytes(path.read_bytes() + b'{"port": "opt')
    assert record.read(tmp_path, "optimizer") == [make()]
    record.append(tmp_path, make(seed=1))
    assert record.read(tmp_path, "optimizer") == [make(), make(seed=1)]


def test_numpy_and_torch_numbers_are_plain(tmp_path: Path) -> None:
    import numpy as np

    path = record.append(tmp_path, make(metrics={"loss": np.float32(0.5), "state_bytes": 3}))
    assert json.loads(path.read_text())["metrics"]["loss"] == 0.5


def test_foreign_lines_are_told(tmp_path: Path) -> None:
    path = record.append(tmp_path, make())
    good = path.read_text()
    path.write_text('{"a": 1, "schema": 2}\n')
    with pytest.raises(CorruptError, match=r"a\.jsonl:1 is not an evidence record"):
        record.read(tmp_path, "optimizer")
    path.write_text(good.replace('"schema": 2', '"schema": 99'))
    with pytest.raises(CorruptError, match="schema 99"):
        record.read(tmp_path, "optimizer")
    with pytest.raises(UserError, match="is a file"):
        record.folder(path)


def test_a_lab_is_what_decides_and_not_the_machine(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")

    def made(**more: Any) -> Lab:
        fields: dict[str, Any] = {"tier": "smoke", "device": "cpu", "bench": "b", "scale": {"n": (1,)}, "budget": {}}
        return Lab.of("kv", **fields | {"data": str(tmp_path), "model": None} | more)

    first = made()
    assert made() == first and made(device="cuda:1").id == made(device="cuda").id != first.id
    others = [made(tier="laptop"), made(bench="c"), made(scale={"n": (2,)}), made(budget={"tokens": 5})]
    assert len({first.id, *(other.id for other in others)}) == 5
    assert others[1].settings == first.settings != others[0].settings, "another bench source, the same wish"
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "a.txt").write_text("one")
    assert made(data=str(moved)).id == first.id, "contents decide, not paths"
    labs.data_of.cache_clear()
    (moved / "a.txt").write_text("two")
    assert made(data=str(moved)).id != first.id
    with pytest.raises(UserError, match="does not exist"):
        made(data=str(tmp_path / "none"))


def test_tiers() -> None:
    from modicum.bench.training import Scale

    def tier(scale: Any = None, **more: Any) -> str:
        return labs.tier_of(scale, **{"quick": False, "model": None, "device": "cpu", "declared": None} | more)

    assert tier() == "smoke" and tier(declared="laptop") == "laptop" and tier(declared="laptop", quick=True) == "smoke"
    assert tier(Scale()) == tier(Scale(width=192, layers=6, tokens=40_000_000), declared="smoke") == "smoke"
    proxy = Scale(width=192, layers=6, tokens=40_000_000)
    assert tier(proxy) == "laptop" and tier(proxy, device="cuda:0") == "gpu"
    assert tier(Scale(width=192, layers=6, tokens=1_000_000)) == "smoke", "hardly trained"


def test_committed_evidence_is_whole() -> None:
    """Every line joins its lab, every lab has its records, every value that is shared is used."""
    home = record.checkout()
    assert home is not None
    folder = home / "evidence"
    used: set[tuple[str, str]] = set()
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in ("labs", "runs")):
        lines = [json.loads(line) for path in place.glob("*.jsonl") for line in path.read_text().splitlines()]
        found = record.read(folder, place.name)
        assert len(found) == len({r.identity() for r in found}) > 0 and len(lines) >= len(found)
        assert {r.lab.port for r in found} == {place.name} and all(r.lab.tier in labs.TIERS for r in found)
        used |= {(line["lab"], line[key]) for line in lines for key in record.SHARED}
    shared = {(path.stem, name) for path in folder.glob("labs/*.json") for name in labs.read(folder, path.stem)[1]}
    assert shared == used


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


def test_times_of_two_machines_are_not_compared() -> None:
    axes = {"quality": AXES["quality"], "cost": {"metric": "seconds", "better": "lower", "unit": "s"}}
    base, same = make("base", axes=axes, seconds=2.0), make("same", axes=axes, seconds=1.0)
    other = make("other", axes=axes, seconds=1.0, machine={"cpu": "y"})
    (rows,) = stats.compare([base, same, other])
    assert [row.cost_ratio for row in rows] == [1.0, 0.5, None]
    assert all(row.quality_ratio == 1.0 for row in rows)
    (rows,) = stats.compare([make("base"), make("other", cost=50.0, machine={"cpu": "y"})])
    assert rows[1].cost_ratio == 0.5, "bytes are bytes everywhere"


def test_records_of_two_labs_never_meet() -> None:
    with pytest.raises(ValueError, match="several labs"):
        stats.compare([make("base"), make("a", lab=lab("r2"))])


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
