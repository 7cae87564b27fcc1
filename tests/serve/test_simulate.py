"""Traces, step times, the simulator against the real engine, the search for a rate, and the verb simulate."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serve_tools import assert_clean, folder, tiny
from typer.testing import CliRunner

from modicum.cli import app
from modicum.core import registry
from modicum.core.errors import ModicumError, UserError
from modicum.serve import pace as step_times
from modicum.serve import traces
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.pace import TERMS, Load, StepTime
from modicum.serve.schedulers import Plan, Scheduler, State
from modicum.serve.simulate import SLO, Played, aimed, capacity, search, simulate, strict_tbt
from modicum.serve.simulate_engine import calibrate, compositions, play
from modicum.serve.traces import Trace

SIMPLE = StepTime(tuple({"step": 0.01, "tokens": 0.001}.get(name, 0.0) for name in TERMS))  # 10 ms + 1 ms a token


def trace_of(*requests: tuple[float, int, int]) -> Trace:
    arrival, prompt, output = zip(*requests, strict=True)
    return Trace("made up", np.array(prompt), np.array(output), np.array(arrival))


def random_trace(n: int, seed: int = 0, most: int = 60) -> Trace:
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(size=n))
    return Trace("random", rng.integers(1, most, n), rng.integers(1, 20, n), arrival - arrival[0])


def make(choice: str, blocks: int = 100, tokens: int = 64, sequences: int = 8, block_size: int = 8) -> Scheduler:
    return registry.build("scheduler", choice, block_size, blocks, tokens, sequences)


# traces -------------------------------------------------------------------------------------------


def test_traces_with_common_columns(tmp_path: Path) -> None:
    """Azure's CSV with dates, Parquet with seconds, Mooncake's JSON Lines with milliseconds; sorted by arrival."""
    start = datetime(2023, 11, 16, 18, 15, 46, 680000)
    rows = [(0.0, 374, 44), (2.5, 396, 109), (1.25, 879, 55)]
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"{start + timedelta(seconds=at)},{prompt},{output}\n" for at, prompt, output in rows
    )
    (tmp_path / "a.csv").write_text(text)
    table = pa.table(dict(zip(("timestamp_s", "prompt_tokens", "output_tokens"), zip(*rows, strict=True), strict=True)))
    pq.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"timestamp": int(a * 1e3) + 7, "input_length": p, "output_length": o}) + "\n"
                for a, p, o in rows)
    )  # fmt: skip
    for trace in (
        traces.read(tmp_path / "a.csv"),
        traces.read(tmp_path / "b.parquet"),
        traces.read(tmp_path / "c.jsonl", unit="ms"),
    ):
        assert trace.arrival_N is not None
        np.testing.assert_allclose(trace.arrival_N, [0, 1.25, 2.5], atol=1e-5)
        assert trace.prompt_N.tolist() == [374, 879, 396] and trace.output_N.tolist() == [44, 55, 109]
        assert trace.rate == pytest.approx(0.8, abs=1e-4)


def test_traces_with_other_columns_and_without_arrivals(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("at,in,out\n5,1,2\n6,3,0\n")
    trace = traces.read(tmp_path / "t.csv", {"arrival": "at", "prompt": "in", "output": "out"})
    assert trace.arrival_N is not None and trace.arrival_N.tolist() == [0.0, 1.0]
    assert trace.output_N.tolist() == [2, 1]  # a prompt is always answered by a token
    bare = traces.read(tmp_path / "t.csv", {"prompt": "in", "output": "out"})
    assert bare.arrival_N is None and bare.rate is None
    with pytest.raises(UserError, match="--poisson"):
        bare.at_rate(2.0)
    drawn = bare.at_rate(2.0, poisson=0)
    assert drawn.rate == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("a,b\n1,2\n", {}, "--columns prompt=NAME"),
        ("prompt,output\nx,2\n", {}, "does not hold numbers"),
        ("prompt,output\n-1,2\n", {}, "none negative"),
        ("prompt,output\n", {}, "holds no request"),
        ("prompt,output\n1,2\n", {"promt": "prompt"}, "Did you mean 'prompt'"),
        ("prompt,output\n1,2\n", {"prompt": "promt"}, "Did you mean 'prompt'"),
        ("time,prompt,output\nnoon,1,2\n", {}, "neither numbers nor dates"),
    ],
)
def test_traces_that_cannot_be_read(tmp_path: Path, text: str, columns: dict[str, str], message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        traces.read(path, columns)


def test_pieces_rates_and_lengths() -> None:
    trace = trace_of((0.0, 100, 10), (1.0, 900, 30), (3.0, 7, 500))
    part = trace.window(1, 2)
    assert part.arrival_N is not None and part.arrival_N.tolist() == [0.0, 2.0] and part.prompt_N.tolist() == [900, 7]
    assert trace.shorter(100).prompt_N.tolist() == [1, 9, 1] and trace.shorter(100).output_N.tolist() == [1, 1, 5]
    cut = trace.within(64)
    assert (cut.prompt_N + cut.output_N).max() <= 64 and cut.output_N.tolist() == [10, 30, 63]
    fast = trace.at_rate(10.0)
    assert fast.arrival_N is not None and fast.rate == pytest.approx(10.0)
    np.testing.assert_allclose(fast.arrival_N / fast.arrival_N[-1], trace.arrival_N / 3.0)  # type: ignore[operator]
    assert trace.at_rate(1.0, 3).arrival_N.tolist() == trace.at_rate(1.0, 3).arrival_N.tolist()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="ask for fewer"):
        trace.window(2, 2)


# step times ---------------------------------------------------------------------------------------


def test_the_time_of_a_step_is_the_sum_of_its_terms() -> None:
    pace = StepTime(tuple(float(i + 1) for i in range(len(TERMS))))
    for works in ([(0, 4), (10, 3), (20, 1)], [(5, 1)], [(0, 500), (9, 1)]):
        load = Load.of(works)
        assert pace.seconds(load) == pytest.approx(np.dot(pace.coefficients, load.terms()))
    assert pace.seconds(Load()) == 0.0


def test_loads_add_up() -> None:
    """The sums of a step, counted one product at a time."""
    works = [(0, 4), (10, 3), (20, 1), (7, 1)]
    load = Load.of(works)
    assert load.tokens == 9 and load.chunks == 2 and load.decodes == 2
    assert load.cached == 21 + 8 and load.reach == 13
    exact = sum(start + i + 1 for start, n in works if n > 1 for i in range(n))  # query-key products
    assert load.pairs + load.late_pairs == pytest.approx(exact, rel=0.1)


def test_the_fit_finds_the_coefficients_and_stands_outliers() -> None:
    rng = np.random.default_rng(0)
    truth = StepTime((5e-3, 1e-4, 1e-4, 0.0, 2e-5, 3e-4, 7e-8, 1e-7, 2e-6, 1e-4, 2e-6))
    loads = [
        Load.of(works)
        for works in compositions(300, EngineConfig(max_batch_tokens=512, max_sequences=32), 2048, 24_000)
    ]
    seconds = np.array([truth.seconds(load) for load in loads]) * rng.lognormal(0, 0.03, len(loads))
    seconds[::40] *= 5  # the machine did something else
    found = step_times.fit(loads, seconds)
    clean = np.array([truth.seconds(load) for load in loads])
    wrong = step_times.errors(found, loads, clean)
    assert np.median(wrong) < 0.02 and wrong.max() < 0.1
    assert min(found.coefficients) >= 0


def test_the_largest_piece_is_the_largest() -> None:
    pace = StepTime((5e-3, 1e-4, 1e-4, 0.0, 2e-5, 3e-4, 7e-8, 1e-7, 2e-6, 1e-4, 2e-6))
    load = Load.of([(300, 1)] * 5)
    for start, left, limit in ((0, 2000, 0.05), (700, 500, 0.05), (64, 10, 0.05), (0, 50, 0.001)):
        n = pace.most(load, start, left, limit)
        times = [pace.seconds(load.plus(start, i)) if i else 0.0 for i in range(left + 1)]
        assert n == max(i for i in range(left + 1) if times[i] <= limit)


def test_a_calibration_is_saved_and_read(tmp_path: Path) -> None:
    StepTime(SIMPLE.coefficients, 1.5, {"model": "x"}).save(tmp_path / "c.json")
    again = StepTime.load(tmp_path / "c.json")
    assert again == StepTime(SIMPLE.coefficients, 1.5, {"model": "x"})
    value = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(value | {"terms": ["step"]}))
    with pytest.raises(UserError, match="another version"):
        StepTime.load(tmp_path / "c.json")
    with pytest.raises(UserError, match="--calibrate"):
        StepTime.load(tmp_path / "none.json")


# the simulator ------------------------------------------------------------------------------------


def test_a_run_worked_out_by_hand() -> None:
    """fcfs, 10 ms a step and 1 ms a token: prompts of 20 and 30 tokens, the second comes 5 ms after the first."""
    played = simulate(trace_of((0.0, 20, 3), (0.005, 30, 2)), make("fcfs"), SIMPLE)
    assert played is not None
    # 0: prompt one until 0.030; prompt two until 0.070; both decode until 0.082; one alone until 0.093
    np.testing.assert_allclose(played.times[0], [0.030, 0.082, 0.093])
    np.testing.assert_allclose(played.times[1], [0.070, 0.082])
    np.testing.assert_allclose(played.started, [0.0, 0.030])
    report = played.report(SLO(tbt=0.05, ttft=0.04, delay=1.0))
    assert report["steps"] == 4 and report["tokens_per_step"] == 53 / 4 and report["preemptions"] == 0
    assert report["ttft_p50"] == pytest.approx((0.030 + 0.065) / 2)
    assert report["tbt_max"] == pytest.approx(0.052) and report["late_gaps"] == pytest.approx(1 / 3)
    assert report["good"] == 0.0 and not report["meets"]  # one has a late gap, the other a late first token
    assert played.report(SLO(tbt=0.06, ttft=0.04))["good"] == 0.5
    assert report["peak_blocks"] == 3 + 4 and report["seconds"] == pytest.approx(0.093)


@pytest.mark.parametrize("choice", ["fcfs", "fcfs:chunked=true", "sarathi:chunk=16,tile=4", "sarathi-serve:budget=24"])
@pytest.mark.parametrize("tokens", [800, 96])
def test_the_simulator_does_what_the_engine_does(choice: str, tokens: int) -> None:
    """Everything waits at the start, so clocks do not matter: the same steps, tokens and preemptions."""
    trace = random_trace(14, most=50)
    trace = Trace("at once", trace.prompt_N, trace.output_N, np.zeros(14))
    config = EngineConfig(
        block_size=8, cache=f"{tokens}tok", max_batch_tokens=64, max_sequences=6, scheduler=choice, prefix_cache=False
    )
    engine = Engine(tiny(), None, config)
    real = play(engine, trace)
    assert_clean(engine)
    simulated = simulate(trace, make(choice, tokens // 8, 64, 6), SIMPLE)
    assert real is not None and simulated is not None
    for name in ("steps", "computed", "preemptions"):
        assert getattr(simulated, name) == getattr(real, name), name
    # The engine's blocks are counted after a step, when those of finished requests are free again.
    assert real.peak_blocks <= simulated.peak_blocks <= tokens // 8
    assert [len(t) for t in simulated.times] == [len(t) for t in real.times] == trace.output_N.tolist()
    assert (tokens == 800) == (real.preemptions == 0), "the small cache should be too small, the large one not"


def test_sarathi_serve_keeps_to_the_time_it_was_given() -> None:
    """At equal load: no gap above `tbt`, where fcfs stalls for whole prompts; and a higher rate is sustained."""
    trace = random_trace(120, most=120)
    slo = SLO(tbt=0.05, delay=1.0)
    serve = str(aimed("sarathi-serve", slo))
    assert serve == "sarathi-serve:tbt=0.05"
    made = make(serve, 200, 256, 16)
    made.pace, made.learner = SIMPLE, None
    calm = simulate(trace.at_rate(8.0), made, SIMPLE)
    stalled = simulate(trace.at_rate(8.0), make("fcfs", 200, 256, 16), SIMPLE)
    assert calm is not None and stalled is not None
    assert calm.gaps().max() <= 0.05 + 1e-9 < stalled.gaps().max()
    rates = {}
    for choice in ("fcfs", serve):
        rates[choice], played = capacity(trace, lambda choice=choice: make(choice, 200, 256, 16), SIMPLE, slo)
        assert played is not None and played.meets(slo)
        faster = simulate(trace.at_rate(1.1 * rates[choice]), make(choice, 200, 256, 16), SIMPLE)
        assert faster is not None and not faster.meets(slo)
    assert rates[serve] > 1.3 * rates["fcfs"], rates


def test_a_run_is_given_up_exactly_when_it_cannot_meet_the_promise() -> None:
    trace = random_trace(80, most=120)
    for tbt in (0.02, 0.05, 0.09, 0.14):
        for rate in (2.0, 8.0, 30.0):
            slo = SLO(tbt=tbt, delay=0.2)
            whole = simulate(trace.at_rate(rate), make("fcfs", 200, 256, 16), SIMPLE)
            brief = simulate(trace.at_rate(rate), make("fcfs", 200, 256, 16), SIMPLE, slo)
            assert whole is not None and whole.meets(slo) == (brief is not None)


@pytest.mark.parametrize("limit", [0.01, 3.7, 900.0])
def test_the_search_brackets_the_limit(limit: float) -> None:
    class Made(Played):
        def meets(self, slo: SLO) -> bool:
            return True

    trace = trace_of((0.0, 1, 1), (1.0, 1, 1))
    found, played = search(lambda rate: Made(trace) if rate <= limit else None, 10_000, SLO(tbt=1.0), 1.0, 0.02)
    assert found <= limit <= found * 1.021 and played is not None
    assert search(lambda rate: None, 100, SLO(tbt=1.0), 1.0, 0.02) == (0.0, None)
    assert search(lambda rate: Made(trace), 100, SLO(tbt=1.0), 1.0, 0.02)[0] == float("inf")


def test_requests_that_cannot_be_held_and_schedulers_that_stand_still() -> None:
    with pytest.raises(UserError, match="--max-length"):
        simulate(trace_of((0.0, 900, 3)), make("fcfs"), SIMPLE)

    class Idle(Scheduler):
        def plan(self, state: State) -> Plan:
            return Plan()

    with pytest.raises(ModicumError, match="starts none"):
        simulate(trace_of((0.0, 9, 3)), Idle(None, 8, 10, 64, 8), SIMPLE)


# the real engine ----------------------------------------------------------------------------------


def test_calibration_of_a_real_model() -> None:
    """Steps are timed on the engine and predicted; accuracy is measured elsewhere, on a quiet machine."""
    config = EngineConfig(block_size=8, cache="2ktok", max_batch_tokens=64, max_sequences=8, prefix_cache=False)
    pace = calibrate(tiny(), config, steps=60)
    about = pace.about
    assert about["steps"] + about["held_out"] <= 60 and about["held_out"] >= 10
    assert 0 <= about["error_median"] <= about["error_p90"] <= about["error_max"]
    assert about["error_median"] < 1.0
    few, many = Load.of([(3, 1)]), Load.of([(100, 1)] * 4 + [(0, 60)])
    assert 0 < pace.seconds(few) < pace.seconds(many)
    assert strict_tbt(pace, random_trace(10), 8) > pace.seconds(few)
    with pytest.raises(UserError, match="at least 50"):
        calibrate(tiny(), config, steps=3)
    with pytest.raises(UserError, match="Allowed: cpu, wall"):
        calibrate(tiny(), config, by="sun")


def test_the_engine_is_on_the_clock_of_the_arrivals() -> None:
    """Waiting is skipped: hours of a trace take seconds, and the scheduler and first tokens are on its clock."""
    engine = Engine(tiny(), None, EngineConfig(block_size=8, cache="1ktok", prefix_cache=False))
    plan, seen, before = engine.scheduler.plan, [], engine.clock
    engine.scheduler.plan = lambda state: (seen.append(state.now), plan(state))[1]  # type: ignore[method-assign]
    played = play(engine, trace_of((0.0, 9, 3), (5000.0, 9, 3)))
    assert played is not None and engine.clock is before
    assert seen[0] < 100 and 5000 <= seen[-1] < 5100 and 5000 <= played.times[1][0] < 5100
    assert played.busy < 100 < played.seconds


def test_compositions_keep_to_the_limits() -> None:
    config = EngineConfig(max_batch_tokens=128, max_sequences=8, block_size=16)
    kinds = set()
    for works in compositions(200, config, 256, 1500):
        assert sum(n for _, n in works) <= 128 and len(works) <= 8
        assert sum(-(-(start + n + 1) // 16) for start, n in works) <= 1500 // 16
        assert all(start + n + 1 < 256 for start, n in works)
        kinds.add((any(n > 1 for _, n in works), any(n == 1 for _, n in works)))
    assert kinds == {(True, True), (True, False), (False, True)}


# the verb -----------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["modicum", "simulate", *arguments])
    result = CliRunner().invoke(app, ["simulate", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    trace = random_trace(60)
    assert trace.arrival_N is not None
    rows = zip(trace.arrival_N, trace.prompt_N, trace.output_N, strict=True)
    (tmp_path / "t.csv").write_text("arrival,prompt,output\n" + "".join(f"{a},{p},{o}\n" for a, p, o in rows))
    SIMPLE.save(tmp_path / "cost.json")
    return {"trace": str(tmp_path / "t.csv"), "cost": str(tmp_path / "cost.json"), "here": str(tmp_path)}


def test_schedulers_are_compared(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(monkeypatch, files["trace"], "--cost", files["cost"], "--rate", "5", "--json")
    found: dict[str, Any] = json.loads(out)
    assert [row["scheduler"].split(":")[0] for row in found["rows"]] == list(registry.methods("scheduler"))
    slo = found["slo"]["tbt"]
    assert f"sarathi-serve:tbt={slo:.4g}" in {row["scheduler"] for row in found["rows"]}
    for row in found["rows"]:
        assert row["rate"] == pytest.approx(5.0) and row["requests"] == 60
        assert row["goodput"] >= 0 and row["ttft_p50"] <= row["ttft_p99"] and row["tpot_p50"] > 0
    shown = run(monkeypatch, files["trace"], "--cost", files["cost"], "--scheduler", "fcfs", "--requests", "20")
    assert "fcfs" in shown and "20 requests" in shown and "sarathi" not in shown


def test_the_rate_is_searched(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--cost", files["cost"], "--find-rate", "--poisson", "--slo-delay", "0.3", "--slo-tbt", "0.08", "--json"]
    rows = json.loads(run(monkeypatch, files["trace"], *options))["rows"]
    assert all(row["sustained_rate"] > 0 and row["meets"] for row in rows)
    assert all(row["tbt_p99"] <= 0.08 and row["delay_p50"] <= 0.3 for row in rows)
    never = ["--cost", files["cost"], "--find-rate", "--slo-tbt", "0.001", "--scheduler", "fcfs"]
    assert "larger --slo-tbt" in run(monkeypatch, files["trace"], *never)


def test_a_model_is_calibrated_and_played(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, cost = str(folder(Path(files["here"]) / "model")), str(Path(files["here"]) / "measured.json")
    limits = ["--max-batch-tokens", "64", "--max-sequences", "8", "--cache", "2ktok", "--steps", "50"]
    out = run(monkeypatch, "--calibrate", "--model", model, "--cost", cost, *limits)
    assert "held-out" in out and StepTime.load(cost).about["max_sequences"] == 8
    wider = run(monkeypatch, files["trace"], "--cost", cost, "--max-sequences", "9", "--scheduler", "fcfs")
    assert "max_sequences beyond what was timed" in wider
    options = ["--model", model, "--cost", cost, "--engine", "--scheduler", "fcfs", "--requests", "8", "--json"]
    rows = json.loads(run(monkeypatch, files["trace"], *options, "--rate", "50", "--cache", "2ktok"))["rows"]
    assert [row["how"] for row in rows] == ["simulated", "engine"]
    assert rows[0]["requests"] == rows[1]["requests"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no trace"),
        (["{trace}"], "--cost FILE"),
        (["{trace}", "--cost", "{cost}", "--engine"], "--model FOLDER"),
        (["{trace}", "--cost", "{cost}", "--cache", "9"], "50ktok"),
        (["{trace}", "--cost", "{cost}", "--cache", "1MiB"], "write tokens"),
        (["{trace}", "--cost", "{cost}", "--columns", "prompt"], "prompt=InputTokens"),
        (["{trace}", "--cost", "{cost}", "--scheduler", "saraty"], "sarathi"),
        (["{trace}", "--cost", "{trace}"], "not a calibration"),
    ],
)
def test_mistakes(files: dict[str, str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *(a.format(**files) for a in arguments))
