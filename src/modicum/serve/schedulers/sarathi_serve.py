"""sarathi-serve: a token budget per step, chosen for a target time between tokens; decodes are never stalled.

A step first takes one token of every decoding sequence, then chunks of prompts in progress, then admits new
ones, until its token budget is used; a prompt is split where the budget ends. So new requests are admitted
without stalling running decodes, and no step takes longer than `tbt`, the target time between two tokens.
The budget is the largest that meets it:

    step   = decodes + chunks of prompts in progress + chunks of new prompts
    budget = max tokens with  spread * seconds(step) <= tbt

`seconds` is a model of step times (`serve/pace.py`), `spread` its error in the slowest steps. It is read from
`cost` (what modicum simulate --calibrate wrote) or learnt while serving.

Agrawal et al. 2024, arXiv:2403.02310, sections 4.1 (chunked prefills), 4.2 (stall-free batches, algorithm 3)
and 4.3 (the budget from one profile of the machine and the wanted time). Departs from it: the budget is
chosen again in each step and counts the context that a chunk attends to, where the paper profiles one
number of tokens (`budget` sets such a number); a step with decodes that are too slow by themselves still
computes `least` tokens of a prompt, so that no prompt starves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modicum.serve.pace import Learner, Load, StepTime
from modicum.serve.schedulers import Job, Plan, Scheduler, State
from modicum.serve.schedulers._room import continue_running, free_blocks, free_slots


@dataclass(frozen=True, kw_only=True)
class Config:
    tbt: float = 0.2  # seconds between two tokens of an answer, which a step should not exceed
    budget: int = 0  # tokens of a step; 0: chosen from tbt in each step
    first: int = 128  # budget until enough steps were measured to know their times
    least: int = 16  # tokens of a prompt that a step computes at any rate
    cost: str = ""  # calibration of step times to read; empty: learnt while serving
    reserve: float = 0.01  # fraction of the blocks that an admission leaves free

    def __post_init__(self) -> None:
        if self.tbt <= 0 or self.budget < 0 or self.first < 1 or self.least < 1:
            raise ValueError(
                f"tbt={self.tbt} must be above 0, budget={self.budget} at least 0, "
                f"first={self.first} and least={self.least} at least 1"
            )


CLAIM = {
    "figure": "2.6 times the request rate of vLLM at the same P99 time between tokens",
    "where": "abstract",
    "scale": "Mistral-7B on one A100",
}
TOY = Config(budget=8, least=2)


class SarathiServe(Scheduler):
    config: Config
    stall_free = True

    def __init__(self, config: Config, *limits: Any, **more: Any):
        super().__init__(config, *limits, **more)
        if config.cost:
            self.pace = StepTime.load(config.cost)
        elif not config.budget:
            self.learner = Learner()

    @property
    def chunks(self) -> bool:
        return True

    def plan(self, state: State) -> Plan:
        spent = _Spent(self.config, state)
        plan = continue_running(state, lambda jobs: self._divide(spent, jobs))
        if plan.preempt:
            return plan
        free = free_blocks(state)
        run = list(plan.run)
        reserve = int(self.config.reserve * state.n_blocks)
        for job in state.waiting[: free_slots(state)]:
            remaining = job.length - job.hit
            need = job.blocks_to_start(remaining, state.block_size)
            n = spent.chunk_for(job.hit, remaining)
            if n <= 0 or need > free - (reserve if run else 0):
                break
            spent.take(job.hit, n)
            run.append((job.id, n))
            free -= need
        return Plan(tuple(run))

    def _divide(self, spent: _Spent, jobs: Sequence[Job]) -> list[tuple[Job, int]]:
        """All decodes, then chunks of prompts in progress within the budget, in order of admission."""
        spent.reset()
        run = []
        for prompts in (False, True):
            for job in jobs:
                if (job.left > 1) is prompts and (n := spent.chunk_for(job.computed, job.left) if prompts else 1) > 0:
                    spent.take(job.computed, n)
                    run.append((job, n))
        return run


class _Spent:
    """The tokens of the step so far, and the tokens of a further prompt that fit its budget."""

    def __init__(self, config: Config, state: State):
        self.config, self.limit, self.pace = config, state.token_limit, state.pace
        self.reset()

    def reset(self) -> None:
        self.load = Load()

    def take(self, start: int, n: int) -> None:
        self.load = self.load.plus(start, n)

    def chunk_for(self, start: int, remaining: int) -> int:
        load, config = self.load, self.config
        available = min(remaining, self.limit - load.tokens)
        if available <= 0:
            return 0
        if config.budget or self.pace is None:
            n = min(available, (config.budget or config.first) - load.tokens)
        else:
            n = self.pace.most(load, start, available, config.tbt / self.pace.spread)
        first = load.tokens == load.decodes  # no chunk yet
        return max(n, min(available, config.least)) if first else n
