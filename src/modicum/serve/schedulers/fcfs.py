"""fcfs: first come, first served, prompts before decodes.

Waiting prompts are admitted in order of arrival as long as blocks, tokens and sequences allow, and are
computed in steps of their own; only when none can be admitted do the running sequences decode, one
token each. A prompt longer than the step's token limit is computed alone. With `chunked` on, every
step first decodes all running sequences and fills the rest of its tokens with pieces of prompts.

    not chunked:  step = prompts[1..m]            if m >= 1 fit, else decodes
    chunked:      step = decodes + prompt pieces, sum of tokens <= token limit

When the cache is full, the sequence admitted last is preempted and computed anew later (Kwon et al.
2023, arXiv:2309.06180, section 4.5: recomputation). Prompts first and by themselves, and the reserve of blocks
that an admission leaves for running sequences to grow into, are those of that paper's system (vLLM's watermark of 1 %).
Departs: a preempted sequence goes back by its arrival, there to the front of the queue.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.serve.schedulers import Plan, Scheduler, State


@dataclass(frozen=True, kw_only=True)
class Config:
    chunked: bool = False  # mix pieces of prompts with decodes
    reserve: float = 0.01  # share of the blocks that an admission leaves free


class FirstComeFirstServed(Scheduler):
    config: Config

    def plan(self, state: State) -> Plan:
        if self.config.chunked:
            return self._mixed(state)
        prompts = self._admit(state, state.free_blocks, state.token_limit)
        return Plan(tuple(prompts)) if prompts else self._go_on(state)

    def _mixed(self, state: State) -> Plan:
        plan = self._go_on(state)
        if plan.preempt:
            return plan
        planned = dict(plan.run)
        # Running sequences are counted with all their known tokens, admitted prompts with their whole
        # length, even if only a piece comes now: half prompts that block each other end in preemption.
        free = state.free_blocks - sum(job.blocks(max(job.left, 1), state.block_size) for job in state.running)
        return Plan(plan.run + tuple(self._admit(state, free, state.token_limit - sum(planned.values()))))

    def _go_on(self, state: State) -> Plan:
        """Every running sequence, decodes first; the latest admissions preempted until the rest fits."""
        keep = sorted(state.running, key=lambda job: job.left > 1)
        free, latest = state.free_blocks, list(state.running)
        preempt: list[int] = []
        while True:
            run: list[tuple[int, int]] = []
            need, tokens = 0, state.token_limit
            for job in keep:
                n = min(job.left, tokens) if self.config.chunked or job.left <= tokens else job.left * (not run)
                if n > 0:
                    run.append((job.id, n))
                    need += job.blocks(n, state.block_size)
                    tokens -= n
            if need <= free or len(keep) <= 1:
                return Plan(tuple(run), tuple(preempt))
            victim = latest.pop()
            preempt.append(victim.id)
            keep.remove(victim)
            free += victim.own

    def _admit(self, state: State, free: int, tokens: int) -> list[tuple[int, int]]:
        """Waiting jobs by arrival; none is passed over for a smaller one behind it."""
        reserve = int(self.config.reserve * state.n_blocks)
        run: list[tuple[int, int]] = []
        for job in state.waiting[: max(0, state.sequence_limit - len(state.running))]:
            left = job.length - job.hit
            n = min(left, tokens) if self.config.chunked else left
            need = job.blocks_to_start(left, state.block_size)
            if n <= 0 or (n > tokens and run) or need > free - (reserve if state.running or run else 0):
                break
            run.append((job.id, n))
            free -= need
            tokens -= n
        return run
