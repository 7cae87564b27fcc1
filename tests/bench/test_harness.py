"""The harness, on a bench of its own (arithmetic, no training), and every port's bench at its quick scale."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modicum.bench import harness, plots, record, stats
from modicum.bench.card import read_card
from modicum.bench.harness import Bench
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Budget, Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Scale:
    size: int = 10
    noise: float = 0.5


class Counting:
    """A bench over the schedule port that sums a schedule's factors; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fail_at: tuple[str, int] | None = None
        self.stop_at: tuple[str, int] | None = None

    def measure(self, choice: Choice, seed: int, settings: Settings) -> Measurement:
        here = (str(choice), seed)
        self.calls.append(here)
        if here == self.fail_at:
            raise RuntimeError("it broke")
        if here == self.stop_at:
            raise KeyboardInterrupt
        schedule = registry.build("schedule", choice)
        total = sum(schedule.scale(i + 0.5, 10.0)["lr"] for i in range(settings.scale.size))
        return Measurement(
            metrics={"area": total + seed, "calls": len(self.calls)},
            cost=Cost(flops=7.0),
            model={"name": "none"},
            data={"name": "numbers", "checksum": "0"},
        )

    def bench(self) -> Bench:
        axes = Axes(quality=Axis("area", "higher"), cost=Axis("seconds"))
        return Bench(
            "schedule",
            axes,
            Scale,
            Scale(size=2),
            frozenset({"tokens"}),
            lambda choice: axes,
            self.measure,
            SimpleNamespace(),
        )  # type: ignore[arg-type]


SETTINGS = Settings(scale=Scale())


def choices(*names: str) -> list[Choice]:
    return harness.pick("schedule", list(names))


def test_every_seed_runs_every_method_before_the_next(tmp_path: Path) -> None:
    counting, path = Counting(), tmp_path
    outcome = harness.run(counting.bench(), choices("constant"), [0, 1], SETTINGS, path)
    assert counting.calls == [("cosine", 0), ("constant", 0), ("cosine", 1), ("constant", 1)]
    assert record.read(path, "schedule") == outcome.records and outcome.measured == 4
    entry = outcome.records[1]
    assert (
        entry.knobs == {"warmup": 0.02} and entry.baseline == "cosine" and entry.lab.scale == {"size": 10, "noise": 0.5}
    )
    assert entry.flops == 7.0 and entry.seconds > 0 and entry.peak_bytes > 2**20
    assert entry.machine == record.machine() and entry.commit == record.commit() and entry.data["checksum"] == "0"
    (rows,) = stats.compare(outcome.records)
    assert [r.choice for r in rows] == ["cosine", "constant"] and rows[1].better is True


def test_resume_takes_what_is_there_and_measures_the_rest(tmp_path: Path) -> None:
    path, first = tmp_path, Counting()
    harness.run(first.bench(), choices("constant"), [0], SETTINGS, path)
    second = Counting()
    outcome = harness.run(second.bench(), choices("constant", "wsd"), [0, 1], SETTINGS, path, resume=True)
    assert second.calls == [("wsd", 0), ("cosine", 1), ("constant", 1), ("wsd", 1)]
    assert (outcome.measured, outcome.skipped, len(outcome.records)) == (4, 2, 6)
    other = Counting()
    harness.run(other.bench(), choices("constant"), [0], Settings(scale=Scale(size=3)), path, resume=True)
    assert len(other.calls) == 2, "another scale is another lab"
    knobs = Counting()
    harness.run(knobs.bench(), choices("constant:warmup=0.5"), [0], SETTINGS, path, resume=True)
    assert knobs.calls == [("constant:warmup=0.5", 0)], "other knobs are another measurement"


def test_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    counting, path = Counting(), tmp_path
    counting.stop_at = ("constant", 1)
    outcome = harness.run(counting.bench(), choices("constant"), [0, 1, 2], SETTINGS, path)
    assert outcome.interrupted and len(record.read(path, "schedule")) == 3
    again = Counting()
    whole = harness.run(again.bench(), choices("constant"), [0, 1, 2], SETTINGS, path, resume=True)
    assert again.calls == [("constant", 1), ("cosine", 2), ("constant", 2)] and len(whole.records) == 6


def test_a_method_that_fails_leaves_the_others(tmp_path: Path) -> None:
    counting, path = Counting(), tmp_path
    counting.fail_at = ("constant", 0)
    outcome = harness.run(counting.bench(), choices("constant", "wsd"), [0, 1], SETTINGS, path)
    assert outcome.failures == {"constant": "RuntimeError: it broke"}
    assert {r.choice for r in outcome.records} == {"cosine", "wsd"} and len(outcome.records) == 4
    broken = Counting()
    broken.fail_at = ("cosine", 0)
    with pytest.raises(RuntimeError):
        harness.run(broken.bench(), choices("constant"), [0], SETTINGS, tmp_path / "other")


def test_pick_adds_the_baseline_and_refuses_early() -> None:
    assert [str(c) for c in choices("wsd", "wsd", "constant:warmup=0.1")] == [
        "cosine",
        "wsd",
        "constant:warmup=0.1",
    ]
    assert str(choices()[0]) == "cosine"
    assert {choice.method for choice in choices()} == set(registry.methods("schedule"))
    swept = read_card(registry.methods("schedule")["infinite-lr"]).sweep
    assert [str(c) for c in choices() if c.method == "infinite-lr"] == [f"infinite-lr:{knobs}" for knobs in swept]
    assert [str(c) for c in choices("cosine:floor=0.5")] == ["cosine", "cosine:floor=0.5"]
    with pytest.raises(UserError, match="unknown schedule method 'cosin'"):
        choices("cosin")
    with pytest.raises(UserError, match="unknown knob"):
        choices("wsd:warmpu=1")


def test_methods_with_a_reason_are_left_out_and_those_that_need_knobs_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        found = [c.method for c in harness.pick("task", [])]
    assert "choice" not in found and "piqa" not in found and "needle" in found and not caplog.text
    assert [c.method for c in harness.pick("step", ["python-split"])] == ["keep", "python-split"], "asked for by name"
    monkeypatch.setattr(harness, "not_measurable", lambda info: "")
    with caplog.at_level(logging.WARNING):
        found = [c.method for c in harness.pick("task", [])]
    assert "choice" not in found and "needle" in found
    assert "left out: task/choice" in caplog.text


def test_scale_is_typed_and_budget_is_kept_or_refused() -> None:
    bench = Counting().bench()
    assert harness.make_scale(bench, False, {}) == Scale() and harness.make_scale(bench, True, {}).size == 2
    assert harness.make_scale(bench, True, {"noise": 1}).noise == 1.0
    with pytest.raises(UserError, match="unknown knob of bench schedule"):
        harness.make_scale(bench, False, {"sise": 1})
    with pytest.raises(UserError, match="size='many'"):
        harness.make_scale(bench, False, {"size": "many"})
    assert harness.check_budget(bench, Budget(tokens=5)) == {"tokens": 5}
    with pytest.raises(UserError, match=r"cannot hold methods to a limit of seconds. Allowed: tokens"):
        harness.check_budget(bench, Budget(seconds=5))


def test_a_promise_that_is_not_measured_is_an_error(tmp_path: Path) -> None:
    bench = Counting().bench()
    axes = Axes(quality=Axis("accuracy"), cost=Axis("seconds"))
    broken = Bench(**{**vars(bench), "axes_of": lambda choice: axes})
    with pytest.raises(UserError, match="promises 'accuracy' and measured only area, calls"):
        harness.run(broken, choices("constant"), [0], SETTINGS, tmp_path)


def test_every_port_has_a_bench() -> None:
    assert set(harness.benches()) == set(registry.ports())
    with pytest.raises(UserError, match="unknown port"):
        harness.load("optimiser")


@pytest.mark.parametrize("port", registry.ports())
def test_quick_bench_measures_the_baseline(port: str, tmp_path: Path) -> None:
    """The real measurement at its smallest: what the axes promise is there, a seed repeats its quality."""
    bench = harness.load(port)
    baseline = Choice(port, registry.port(port).baseline)
    settings = Settings(scale=harness.make_scale(bench, True, {}))
    outcome = harness.run(bench, [baseline], [0], settings, tmp_path)
    (entry,) = outcome.records
    for axis in entry.axes.values():
        assert entry.value(axis["metric"]) == entry.value(axis["metric"]), f"{axis['metric']} is not a number"
    assert entry.data["checksum"] and entry.seconds > 0
    if port != "scheduler":  # whose quality is a time
        again = bench.measure(baseline, 0, settings)
        name = entry.axes["quality"]["metric"]
        assert again.metrics[name] == pytest.approx(entry.value(name), rel=1e-6), "the same seed gave another quality"
        assert again.model.get("checksum") == entry.model.get("checksum")


def test_budgets_hold_in_a_training_bench(tmp_path: Path) -> None:
    bench = harness.load("optimizer")
    settings = Settings(scale=harness.make_scale(bench, True, {}), budget=Budget(tokens=512))
    entry = harness.run(bench, harness.pick("optimizer", ["adamw"]), [0], settings, tmp_path).records[0]
    assert entry.metrics["tokens"] == 512 and entry.lab.budget == {"tokens": 512}


def test_memory_budget_refuses_an_index_that_cannot_fit(tmp_path: Path) -> None:
    bench = harness.load("index")
    settings = Settings(scale=harness.make_scale(bench, True, {}), budget=Budget(memory_bytes=1000))
    with pytest.raises(UserError, match="of memory, the budget is"):
        harness.run(bench, harness.pick("index", ["exact"]), [0], settings, tmp_path)


def test_own_folder_is_measured_on(tmp_path: Path) -> None:
    text = "A modest amount of text, repeated with numbers so that files differ. "
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"File {i}. " + text * (8 + i % 3))
    bench = harness.load("schedule")
    settings = Settings(
        scale=harness.make_scale(bench, True, {"corpus_bytes": 12_000, "heldout_bytes": 2_000}),
        data=str(tmp_path),
    )
    entry = bench.measure(Choice("schedule", "cosine"), 0, settings)
    assert entry.data["name"] == tmp_path.name and entry.data["train_bytes"] >= 10_000


def test_plots_hold_every_method(tmp_path: Path) -> None:
    counting = Counting()
    outcome = harness.run(counting.bench(), choices(), [0, 1], SETTINGS, tmp_path)
    parts: list[Any] = stats.compare(outcome.records)
    plots.write_page(tmp_path / "p.html", "schedule", parts)
    page = (tmp_path / "p.html").read_text()
    picture = plots.svg("schedule", parts[0])
    assert picture == plots.svg("schedule", parts[0])
    for name in map(str, choices()):
        assert f"<b>{name}" in page.replace("\\u003c", "<").replace("\\u003e", ">") and f">{name}</text>" in picture
    assert 'src="http' not in page and "viewport" in page
    front = plots.front(parts[0])
    assert max(r.quality.mean for r in parts[0]) == max(r.quality.mean for r in front)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.31, 2.32), (70_000, 140_000), (1e-4, 9e-4), (-3, 11)])
def test_ticks_are_few_round_and_within(low: float, high: float) -> None:
    found = plots.ticks(low, high)
    assert 3 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert len({f"{t:.6g}" for t in found}) == len(found)
    assert all(float(f"{t:.4g}") == pytest.approx(t) for t in found), found


def test_pareto_front_is_the_undominated() -> None:
    axes = {
        "quality": {"metric": "q", "better": "higher", "unit": ""},
        "cost": {"metric": "c", "better": "lower", "unit": ""},
    }

    def row(name: str, quality: float, cost: float) -> Any:
        return SimpleNamespace(
            choice=name, axes=axes, quality=stats.Spread(quality, None, 1), cost=stats.Spread(cost, None, 1)
        )

    rows = [
        row("a", 1.0, 1.0),
        row("b", 0.5, 2.0),
        row("c", 2.0, 3.0),
        row("d", 2.0, 4.0),
        row("e", 3.0, 5.0),
    ]
    assert [r.choice for r in plots.front(rows)] == ["a", "c", "e"]
