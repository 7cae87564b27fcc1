"""What must hold for any scheduler: pure plans, no block or token spent twice, nobody starves."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import dataclass, field

import numpy as np

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.serve.pace import TERMS, StepTime
from modicum.serve.schedulers import Job, Plan, Scheduler


@dataclass
class World:
    """A cache of blocks and a clock of steps around a scheduler; the smallest discrete-event simulator."""

    scheduler: Scheduler
    free: int
    allocated: dict[int, int] = field(default_factory=dict)  # blocks by job
    outputs: dict[int, int] = field(default_factory=dict)  # tokens still to generate
    finished: list[int] = field(default_factory=list)
    steps: int = 0

    def arrive(self, job: Job, output: int) -> None:
        self.outputs[job.id] = output
        self.scheduler.add(job)

    def step(self) -> Plan:
        s = self.scheduler
        state = s.state(self.free, float(self.steps))
        before = copy.deepcopy((list(state.waiting), list(state.running)))
        plan = s.plan(state)
        assert s.plan(s.state(self.free, float(self.steps))) == plan, "the same state gave two plans"
        assert before == (list(s.waiting), list(s.running)), "plan() changed its state"
        self._check(plan)
        for id in plan.preempt:
            self.free += self.allocated.pop(id, 0)
        s.commit(plan)
        for id, n in plan.run:
            job = s.jobs[id]
            need = -(-(job.computed + n) // s.block_size) - self.allocated.get(id, 0)
            self.free -= max(0, need)
            self.allocated[id] = self.allocated.get(id, 0) + max(0, need)
            job.capacity = self.allocated[id] * s.block_size
            job.own = self.allocated[id]
            assert self.free >= 0, f"the plan used {-self.free} blocks more than were free"
            sampled = int(job.computed + n == job.length)
            s.advance(id, n, sampled)
            self.outputs[id] -= sampled
            if self.outputs[id] == 0:
                s.remove(id)
                self.free += self.allocated.pop(id)
                self.finished.append(id)
        self.steps += 1
        return plan

    def _check(self, plan: Plan) -> None:
        s = self.scheduler
        ids = [id for id, _ in plan.run]
        assert len(set(ids)) == len(ids), f"a sequence is planned twice: {ids}"
        assert not set(ids) & set(plan.preempt), "a sequence is both run and preempted"
        running = {job.id for job in s.running}
        assert set(plan.preempt) <= running, "only running sequences can be preempted"
        alive = len(running) - len(plan.preempt) + len(set(ids) - running)
        assert alive <= s.sequence_limit, f"{alive} sequences run, {s.sequence_limit} are allowed"
        for id, n in plan.run:
            job = s.jobs[id]
            left = job.left if id in running else job.length - job.hit
            assert 1 <= n <= left, f"{n} tokens planned of {left} left"
        if s.stall_free:
            decoding = {job.id for job in s.running if job.left == 1}
            paused = decoding - set(ids) - set(plan.preempt)
            assert not paused, f"{sorted(paused)} decode and are not in the step; the method says it never pauses them"
        total = sum(n for _, n in plan.run)
        assert total <= s.token_limit or len(plan.run) == 1, f"{total} tokens planned, {s.token_limit} allowed"


def build(
    key: str, *, block_size: int = 4, n_blocks: int = 12, token_limit: int = 16, sequence_limit: int = 5
) -> World:
    loaded = registry.load("scheduler", key)
    config = getattr(loaded.module, "TOY", None) or loaded.config()
    return World(loaded.cls(config, block_size, n_blocks, token_limit, sequence_limit), n_blocks)


def run_trace(world: World, trace: list[tuple[int, int, int]]) -> World:
    """`trace` holds (arrival step, prompt tokens, output tokens); runs until everything is done."""
    limit = 40 + sum(4 * (prompt + output) for _, prompt, output in trace) + max(t for t, _, _ in trace)
    todo = sorted(enumerate(trace), key=lambda item: (item[1][0], item[0]))
    while todo or world.scheduler.pending():
        while todo and todo[0][1][0] <= world.steps:
            id, (arrival, prompt, output) = todo.pop(0)
            world.arrive(Job(id, float(arrival), prompt, prompt), output)
        world.step()
        assert world.steps < limit, (
            f"after {world.steps} steps {sorted(world.scheduler.jobs)} are not done: "
            "a job starves or the scheduler stands still"
        )
    assert world.free == world.scheduler.n_blocks, "blocks are missing at the end"
    return world


def check_everything_finishes(key: str) -> None:
    """Random arrivals, prompts and outputs, with a cache too small for all: each job is served."""
    for seed in range(12):
        rng = random.Random(seed)
        world = build(key)
        longest = world.scheduler.n_blocks * world.scheduler.block_size
        trace = []
        for _ in range(rng.randint(1, 24)):
            prompt = rng.randint(1, longest - 1)
            trace.append((rng.randint(0, 60), prompt, rng.randint(1, longest - prompt)))
        done = run_trace(world, trace).finished
        assert sorted(done) == list(range(len(trace))), f"seed {seed}: finished {done} of {len(trace)}"


def check_nobody_starves(key: str) -> None:
    """A long job among an endless stream of short ones is done in bounded time."""
    world = build(key)
    world.arrive(Job(0, 0.0, 30, 30), 10)
    id = 1
    while 0 not in world.finished:
        world.arrive(Job(id, float(world.steps), 3, 3), 2)
        id += 1
        world.step()
        assert world.steps < 400, "a long job starves behind short ones"


def check_abort(key: str) -> None:
    """Jobs removed at any time leave no trace."""
    rng = random.Random(0)
    world = build(key)
    for id in range(40):
        world.arrive(Job(id, float(id), rng.randint(1, 20), 0), rng.randint(1, 8))
        world.scheduler.jobs[id].length = world.scheduler.jobs[id].prompt
        world.step()
        if world.scheduler.jobs and rng.random() < 0.5:
            gone = rng.choice(sorted(world.scheduler.jobs))
            world.scheduler.remove(gone)
            world.free += world.allocated.pop(gone, 0)
    while world.scheduler.pending():
        world.step()
        assert world.steps < 2000, "the scheduler stands still"
    assert world.free == world.scheduler.n_blocks


def check_idle(key: str) -> None:
    """Nothing to do gives an empty plan."""
    assert build(key).step() == Plan(), "an idle scheduler planned something"


def check_oldest_goes_on(key: str) -> None:
    """Under arrivals that never end, the job that came first is served within a bounded number of steps."""
    for seed in range(3):
        rng = random.Random(seed)
        world = build(key)
        unserved = id = 0
        while world.steps < 200:
            for _ in range(rng.choice((0, 0, 1, 2))):
                world.arrive(Job(id, float(world.steps), prompt := rng.randint(1, 24), prompt), rng.randint(1, 12))
                id += 1
            oldest = min(world.scheduler.jobs, default=None)
            plan = world.step()
            unserved = 0 if oldest is None or oldest in dict(plan.run) else unserved + 1
            assert unserved < 40, f"seed {seed}: job {oldest} came first and has no token in {unserved} steps"


def check_simulator_and_trace(key: str) -> None:
    """Under the simulator's clock every request gets its tokens, in order, and is seen to begin."""
    from modicum.serve.simulate import simulate
    from modicum.serve.traces import Trace

    pace = StepTime(tuple(1e-3 if name in ("step", "tokens") else 1e-5 for name in TERMS))
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(1, 24, 30), rng.integers(1, 20, 30)
    trace = Trace("random", prompt, output, np.sort(rng.uniform(0, 0.6, 30)))
    trace = trace.at_rate(50.0)
    played = simulate(trace, build(key).scheduler, pace)
    assert played is not None and trace.arrival_N is not None
    for i, times in enumerate(played.times):
        assert len(times) == output[i], f"request {i} got {len(times)} tokens of {output[i]}"
        assert trace.arrival_N[i] <= played.started[i] < times[0], f"request {i} was answered before it began"
        assert all(a < b for a, b in itertools.pairwise(times)), f"tokens of request {i} out of order"


def check_outputs_do_not_change(key: str) -> None:
    """Greedy outputs of the real engine are those of a sequence alone, crowded cache or not."""
    import torch

    from modicum.model.config import llama_like
    from modicum.model.decoder import Decoder
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams

    model = Decoder(llama_like(64, 32, 2, heads=4, kv_heads=2, context_length=64), torch.Generator().manual_seed(3))
    with torch.no_grad():  # livelier than a fresh initialisation, whose outputs hardly differ
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4.0)
    toy = getattr(registry.load("scheduler", key).module, "TOY", None)
    choice = Choice("scheduler", key, vars(toy) if toy is not None else {})
    rng = random.Random(0)
    prompts = [[rng.randrange(64) for _ in range(n)] for n in (1, 3, 17, 30, 8, 22, 13, 5)]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    alone = Engine(model, None, EngineConfig(block_size=4, cache="64tok", max_sequences=1, prefix_cache=False))
    want = [alone.generate([p], params)[0].tokens for p in prompts]
    for cache in ("400tok", "64tok"):
        engine = Engine(
            model, None, EngineConfig(block_size=4, cache=cache, max_batch_tokens=12, max_sequences=5, scheduler=choice)
        )
        got = [output.tokens for output in engine.generate(prompts, params)]
        assert got == want, f"with a cache of {cache} the greedy output differs"
        assert engine.blocks.free == engine.blocks.n_blocks, "blocks are held after the end"
