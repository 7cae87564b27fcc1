"""port scheduler: which sequences run in the next step, and how many tokens of each.

A method defines one pure function, `plan(state) -> Plan`. The base class tracks which sequences wait and run
and how many tokens of each are computed, for the engine and the simulator alike: it uses neither tensors
nor a clock. One step of either is

    plan = scheduler.plan(scheduler.state(free_blocks, now))
    scheduler.commit(plan)                  # preempted jobs wait again, admitted ones run
    scheduler.advance(id, computed, new)    # for each id of plan.run, after its tokens were computed
    scheduler.remove(id)                    # finished, aborted or failed
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modicum.core.errors import ModicumError
from modicum.core.registry import Method
from modicum.serve.pace import Learner, Load, StepTime

BASELINE = "fcfs"


@dataclass(slots=True)
class Job:
    """A sequence as the scheduler sees it. All lengths in tokens.

    length: tokens so far, prompt and generated. computed: those whose keys and values are cached;
    length - computed == 1 means the sequence is decoding. capacity: tokens that fit its blocks.
    own: blocks freed by preempting it (an estimate; shared ones may be included).
    hit: tokens of a waiting job that are in the prefix cache; revived: blocks of these that count
    as free until they are taken.
    """

    id: int
    arrival: float
    prompt: int
    length: int
    computed: int = 0
    capacity: int = 0
    own: int = 0
    hit: int = 0
    revived: int = 0
    preempted: int = 0

    @property
    def left(self) -> int:
        """Tokens that are still to be computed."""
        return self.length - self.computed

    def blocks(self, n_tokens: int, block_size: int) -> int:
        """Free blocks used up by computing `n_tokens` more."""
        return max(0, -(-(self.computed + n_tokens - self.capacity) // block_size))

    def blocks_to_start(self, n_tokens: int, block_size: int) -> int:
        """Free blocks used up by admitting this waiting job with its hit and `n_tokens` after it."""
        return self.revived + -(-(self.hit + n_tokens) // block_size) - self.hit // block_size


@dataclass(frozen=True, slots=True)
class State:
    """The input of a plan. `waiting` (by arrival) and `running` (by admission) are only read."""

    waiting: Sequence[Job]
    running: Sequence[Job]
    free_blocks: int
    n_blocks: int
    block_size: int
    token_limit: int  # tokens one step should not exceed
    sequence_limit: int  # sequences that may run at once
    now: float  # seconds, on the clock of the arrivals
    pace: StepTime | None = None  # how long a step takes, if that is known


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: `run` holds (id, tokens to compute) in order of precedence, ids from `waiting` are admitted.

    `preempt` gives its blocks back, waits again (by arrival) and is computed anew later.
    """

    run: tuple[tuple[int, int], ...] = ()
    preempt: tuple[int, ...] = ()


class Scheduler(Method):
    """Base of the methods, constructed as `cls(config, block_size, n_blocks, token_limit, sequence_limit)`.

    `stall_free`: a running sequence that decodes is in every step, unless it is preempted for its blocks.
    A method that needs to know how long steps take sets `pace` (a calibration) or `learner` (then the steps
    that `state` and `commit` tell of are timed by the clock they are given); `plan` finds it in its state.
    What every method must keep: the oldest job makes progress, so nobody starves; one sequence that fits
    the cache alone is never refused; never more blocks than are free, never more sequences than allowed.
    """

    stall_free = False

    def __init__(self, config: Any, block_size: int, n_blocks: int, token_limit: int, sequence_limit: int):
        self.config = config
        self.block_size, self.n_blocks = block_size, n_blocks
        self.token_limit, self.sequence_limit = token_limit, sequence_limit
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.jobs: dict[int, Job] = {}
        self.pace: StepTime | None = None
        self.learner: Learner | None = None
        self._planned_at = 0.0  # when the last plan was asked for
        self._load: Load | None = None  # of the step that is under way, while a learner wants to know

    @property
    def chunks(self) -> bool:
        """Whether a prompt may be computed over several steps."""
        return bool(getattr(self.config, "chunked", False))

    def plan(self, state: State) -> Plan:
        """The next step. Pure: depends on `state` and the config alone and changes neither."""
        raise NotImplementedError

    def state(self, free_blocks: int, now: float) -> State:
        if self.learner is not None:
            if self._load is not None:
                self.learner.add(self._load, now - self._planned_at)
                self.pace, self._load = self.learner.model or self.pace, None
            self._planned_at = now
        return State(
            self.waiting,
            self.running,
            free_blocks,
            self.n_blocks,
            self.block_size,
            self.token_limit,
            self.sequence_limit,
            now,
            self.pace,
        )

    def add(self, job: Job) -> None:
        if not self.jobs:
            self._load = None  # nobody was there: the time since the last step says nothing of it
        self.jobs[job.id] = job
        insort(self.waiting, job, key=lambda j: (j.arrival, j.id))

    def commit(self, plan: Plan) -> None:
        """Make the plan so: preempted jobs wait and start over, admitted ones run from their hit on."""
        for id in plan.preempt:
            job = self.jobs[id]
            self.running.remove(job)
            job.computed = job.capacity = job.own = job.hit = job.revived = 0
            job.preempted += 1
            insort(self.waiting, job, key=lambda j: (j.arrival, j.id))
        running = {job.id for job in self.running}
        admitted = {id for id, _ in plan.run} - running
        if admitted:
            self.waiting = [job for job in self.waiting if job.id not in admitted]
            for id, _ in plan.run:
                if id in admitted:
                    job = self.jobs[id]
                    job.computed = job.capacity = job.hit
                    self.running.append(job)
        if self.learner is not None:
            self._load = Load.of((self.jobs[id].computed, n) for id, n in plan.run) if plan.run else None

    def advance(self, id: int, computed: int, new: int) -> None:
        """`computed` more tokens are cached, `new` more are known."""
        job = self.jobs[id]
        job.computed += computed
        job.length += new
        if job.computed > job.length:
            raise ModicumError(f"sequence {id} has {job.computed} cached tokens of {job.length} known ones")

    def remove(self, id: int) -> None:
        """Forget a job, wherever it stands; unknown ids are ignored."""
        job = self.jobs.pop(id, None)
        if job is not None:
            (self.running if job in self.running else self.waiting).remove(job)

    def pending(self) -> int:
        return len(self.waiting) + len(self.running)
