"""Schedulers against plans written out by hand, and the port's promises under random loads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.serve.config import EngineConfig, make_scheduler
from modicum.serve.pace import TERMS, Learner, Load, StepTime
from modicum.serve.schedulers import Job, Plan, Scheduler, State, _conformance
from modicum.serve.schedulers._conformance import World, run_trace
from modicum.serve.schedulers.fcfs import Config as FcfsConfig
from modicum.serve.schedulers.fcfs import FirstComeFirstServed
from modicum.serve.schedulers.sarathi import Config as SarathiConfig
from modicum.serve.schedulers.sarathi import Sarathi
from modicum.serve.schedulers.sarathi_serve import Config as ServeConfig
from modicum.serve.schedulers.sarathi_serve import SarathiServe


def _pace(**seconds: float) -> StepTime:
    names = {name.replace(" ", "_"): 0.0 for name in TERMS} | seconds
    return StepTime(tuple(names.values()))


def _arrive(scheduler: Scheduler, *lengths: int) -> None:
    for length in lengths:
        id = len(scheduler.jobs)
        scheduler.add(Job(id, float(id), length, length))


def _step(scheduler: Scheduler, free: int = 1000) -> dict[int, int]:
    """One step with blocks in plenty; returns the plan's tokens by id."""
    plan = scheduler.plan(scheduler.state(free, 0.0))
    scheduler.commit(plan)
    for id, n in plan.run:
        job = scheduler.jobs[id]
        scheduler.advance(id, n, int(job.computed + n == job.length))
        job.capacity = job.own = 10_000
    return dict(plan.run)


def test_sarathi_one_chunk_and_all_decodes() -> None:
    """chunk 8, tile 4: n = floor((8 + d) / 4) * 4 - d tokens of one prompt beside d decodes."""
    scheduler = Sarathi(SarathiConfig(chunk=8, tile=4), 4, 1000, 64, 8)
    _arrive(scheduler, 3, 20, 9)
    assert _step(scheduler) == {0: 3}  # no second prompt in the same step, however short the first
    assert _step(scheduler) == {0: 1, 1: 7}  # floor(9 / 4) * 4 - 1
    assert _step(scheduler) == {0: 1, 1: 7}
    assert _step(scheduler) == {0: 1, 1: 6}  # the prompt's rest
    assert _step(scheduler) == {0: 1, 1: 1, 2: 6}  # floor(10 / 4) * 4 - 2
    assert _step(scheduler) == {0: 1, 1: 1, 2: 3}
    assert _step(scheduler) == {0: 1, 1: 1, 2: 1}


def test_sarathi_without_tile_keeps_its_chunk() -> None:
    scheduler = Sarathi(SarathiConfig(chunk=8, tile=0), 4, 1000, 64, 8)
    _arrive(scheduler, 3, 20)
    assert [_step(scheduler) for _ in range(3)] == [{0: 3}, {0: 1, 1: 8}, {0: 1, 1: 8}]


def test_sarathi_serve_fills_a_fixed_budget() -> None:
    """Decodes, then begun prompts, then new ones, until 8 tokens are spent."""
    scheduler = SarathiServe(ServeConfig(budget=8, least=1), 4, 1000, 64, 8)
    _arrive(scheduler, 3, 2, 9, 4)
    assert _step(scheduler) == {0: 3, 1: 2, 2: 3}
    assert _step(scheduler) == {0: 1, 1: 1, 2: 6}
    assert _step(scheduler) == {0: 1, 1: 1, 2: 1, 3: 4}
    assert _step(scheduler) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_sarathi_serve_chooses_the_largest_piece_within_the_time() -> None:
    """10 ms a step, 1 ms a token, 0.1 ms per cached token that a piece looks back on; 50 ms are wanted."""
    pace = _pace(step=10e-3, tokens=1e-3, reach=1e-4)
    scheduler = SarathiServe(ServeConfig(tbt=0.05, least=1), 16, 1000, 512, 8)
    scheduler.pace = pace
    _arrive(scheduler, 5, 100)
    assert _step(scheduler) == {0: 5, 1: 35}  # 10 + 40
    # 10 + 1 + n + 0.1 (35 + n) <= 50 gives n <= 32.3
    assert _step(scheduler) == {0: 1, 1: 32}
    # 10 + 1 + n + 0.1 (67 + n) <= 50 gives n <= 29.4
    assert _step(scheduler) == {0: 1, 1: 29}
    for n in (31, 32, 33):
        seconds = pace.seconds(Load.of([(5, 1), (35, n)]))
        assert (seconds <= 0.05) == (n <= 32)
    slow = SarathiServe(ServeConfig(tbt=0.05, least=1), 16, 1000, 512, 8)
    slow.pace = StepTime(pace.coefficients, spread=2.0)  # a slow step takes twice as long
    _arrive(slow, 100)
    assert _step(slow) == {0: 15}  # 2 (10 + 15) = 50


def test_sarathi_serve_goes_on_with_prompts_when_decodes_alone_are_too_slow() -> None:
    scheduler = SarathiServe(ServeConfig(tbt=0.001, least=4), 16, 1000, 512, 8)
    scheduler.pace = _pace(step=1.0)
    _arrive(scheduler, 4, 10)
    assert [_step(scheduler) for _ in range(4)] == [{0: 4}, {0: 1, 1: 4}, {0: 1, 1: 4}, {0: 1, 1: 2}]


def test_prompts_are_counted_whole_on_admission() -> None:
    """Two prompts of 40 tokens do not fit 15 blocks of 4: the second waits, though its first piece would fit."""
    for scheduler in (
        Sarathi(SarathiConfig(chunk=8, tile=0), 4, 15, 64, 8),
        SarathiServe(ServeConfig(budget=48), 4, 15, 64, 8),
    ):
        _arrive(scheduler, 40, 40)
        assert list(_step(scheduler, 15)) == [0]
        assert 1 not in _step(scheduler, 5)


def test_the_latest_is_preempted_when_decodes_need_its_blocks() -> None:
    for scheduler in (
        FirstComeFirstServed(FcfsConfig(), 4, 8, 64, 8),
        FirstComeFirstServed(FcfsConfig(chunked=True), 4, 8, 64, 8),
        Sarathi(SarathiConfig(), 4, 8, 64, 8),
        SarathiServe(ServeConfig(budget=64), 4, 8, 64, 8),
    ):
        for id in range(3):
            scheduler.add(Job(id, float(id), 8, 8))
            scheduler.commit(Plan(((id, 1),)))
            scheduler.advance(id, 8, 1)
            scheduler.jobs[id].capacity, scheduler.jobs[id].own = 8, 2
        plan = scheduler.plan(scheduler.state(2, 0.0))  # each needs one block more, two are free
        assert plan == Plan(((0, 1), (1, 1)), (2,))


def test_an_admission_leaves_the_reserve_to_those_that_run() -> None:
    """100 blocks of 4, a tenth reserved; a prompt of 12 tokens needs three, and 13 must be free beside a job."""
    for make in (
        lambda: FirstComeFirstServed(FcfsConfig(reserve=0.1), 4, 100, 64, 8),
        lambda: FirstComeFirstServed(FcfsConfig(reserve=0.1, chunked=True), 4, 100, 64, 8),
        lambda: Sarathi(SarathiConfig(chunk=32, tile=0, reserve=0.1), 4, 100, 64, 8),
        lambda: SarathiServe(ServeConfig(budget=64, reserve=0.1), 4, 100, 64, 8),
    ):
        for free, admitted in ((12, False), (13, True)):
            scheduler = make()
            scheduler.add(Job(0, 0.0, 4, 4))
            scheduler.commit(Plan(((0, 4),)))
            scheduler.advance(0, 4, 1)
            scheduler.jobs[0].capacity, scheduler.jobs[0].own = 8, 2  # its next tokens need no block
            scheduler.add(Job(1, 1.0, 12, 12))
            plan = scheduler.plan(scheduler.state(free, 0.0))
            assert (1 in dict(plan.run)) == admitted, (type(scheduler).__name__, free)
        alone = make()
        alone.add(Job(0, 0.0, 12, 12))
        assert dict(alone.plan(alone.state(3, 0.0)).run) == {0: 12}, "nobody runs for whom to keep it"


def test_step_times_are_learnt_from_the_clock() -> None:
    """The base times what was committed; an idle gap and a step that was changed afterwards do not count."""
    scheduler = SarathiServe(ServeConfig(tbt=0.05, first=16), 16, 1000, 512, 64)
    truth = _pace(step=2e-3, tokens=1e-4, cached=1e-6)
    rng, now, id = random.Random(0), 0.0, 0
    for _ in range(400):
        if rng.random() < 0.3 or not scheduler.jobs:
            now += 0.0 if scheduler.jobs else 60.0
            scheduler.add(Job(id, now, length := rng.randint(2, 300), length))
            id += 1
        plan = scheduler.plan(scheduler.state(1000, now))
        scheduler.commit(plan)
        if rng.random() < 0.1 and plan.run:
            scheduler.commit(Plan(preempt=(plan.run[-1][0],)))  # there was no room for it after all
            now += 5.0
            continue
        now += truth.seconds(Load.of((scheduler.jobs[i].computed, n) for i, n in plan.run))
        for i, n in plan.run:
            job = scheduler.jobs[i]
            job.capacity = job.own = 10_000
            scheduler.advance(i, n, int(job.computed + n == job.length))
            if job.length > job.prompt + 20:
                scheduler.remove(i)
    assert scheduler.pace is not None and scheduler.learner is not None
    assert scheduler.learner.seen > 200 and max(scheduler.learner.seconds) < 1.0
    for works in ([(100, 1)] * 8, [(0, 60)], [(50, 1), (60, 40)]):
        assert scheduler.pace.seconds(Load.of(works)) == pytest.approx(truth.seconds(Load.of(works)), rel=0.02)


def test_a_learner_needs_enough_steps() -> None:
    learner = Learner(least=24)
    for n in range(23):
        learner.add(Load.of([(0, n + 2)]), 0.01)
    assert learner.model is None
    learner.add(Load.of([(0, 9)]), 0.01)
    assert learner.model is not None and learner.model.seconds(Load.of([(0, 5)])) == pytest.approx(0.01, rel=1e-6)


def test_a_calibration_can_be_given(tmp_path: Path) -> None:
    pace = _pace(step=0.01, tokens=0.001)
    pace.save(tmp_path / "cost.json")
    scheduler = registry.build("scheduler", f"sarathi-serve:tbt=0.05,cost={tmp_path / 'cost.json'}", 16, 100, 512, 8)
    assert scheduler.pace == pace and scheduler.learner is None
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="--calibrate"):
        registry.build("scheduler", f"sarathi-serve:cost={tmp_path / 'other.json'}", 16, 100, 512, 8)


@pytest.mark.parametrize(
    ("choice", "word"),
    [("sarathi:chunk=0", "chunk"), ("sarathi:tile=512", "tile"), ("sarathi-serve:tbt=0", "tbt")],
)
def test_impossible_knobs(choice: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Choice.parse("scheduler", choice).config()


def test_chunked_prefill_of_a_scheduler_that_always_cuts() -> None:
    assert make_scheduler(EngineConfig(scheduler="sarathi", chunked_prefill=True), 10).chunks
    with pytest.raises(UserError, match="always cuts prompts"):
        make_scheduler(EngineConfig(scheduler="sarathi", chunked_prefill=False), 10)


requests = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=25)
VARIANTS = (
    "fcfs",
    "fcfs:chunked=true",
    "sarathi:chunk=6,tile=2",
    "sarathi:chunk=3,tile=0",
    "sarathi-serve:budget=8,least=2",
    "sarathi-serve:tbt=0.03,first=8,least=1",
)


@pytest.mark.parametrize("choice", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(trace=requests, blocks=st.integers(13, 40), tokens=st.integers(1, 24), sequences=st.integers(1, 8))
def test_nobody_starves(
    choice: str, trace: list[tuple[int, int, int]], blocks: int, tokens: int, sequences: int
) -> None:
    """Random arrivals, caches and limits: all are served, blocks and tokens never spent twice, plans pure."""
    world = World(registry.build("scheduler", choice, 4, blocks, tokens, sequences), blocks)
    if "tbt" in choice:
        world.scheduler.pace, world.scheduler.learner = _pace(step=0.01, tokens=0.002), None
    assert sorted(run_trace(world, trace).finished) == list(range(len(trace)))


class _LastComeFirst(Scheduler):
    """Starves the oldest."""

    stall_free = True

    def plan(self, state: State) -> Plan:
        job = next(iter(list(state.waiting)[::-1] if not state.running else state.running))
        return Plan(((job.id, job.left),)) if job.left <= state.token_limit else Plan()


def test_conformance_sees_a_scheduler_that_starves_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conformance, "build", lambda key: World(_LastComeFirst(None, 4, 12, 64, 5), 12))
    with pytest.raises(AssertionError, match="came first"):
        _conformance.check_oldest_goes_on("bad")

    class Pausing(_LastComeFirst):
        def plan(self, state: State) -> Plan:
            return Plan(tuple((j.id, j.left) for j in state.waiting[:1] if j.left < 12)) or Plan()

    world = World(Pausing(None, 4, 12, 64, 5), 12)
    world.arrive(Job(0, 0.0, 4, 4), 4)
    world.arrive(Job(1, 0.0, 4, 4), 4)
    with pytest.raises(AssertionError, match="decode and are not in the step"):
        world.step()
        world.step()
