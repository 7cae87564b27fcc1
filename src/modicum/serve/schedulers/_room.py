"""Common to schedulers that mix decodes with prefill chunks: cache blocks for running and for new sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modicum.serve.schedulers import Job, Plan, State

Divide = Callable[[Sequence[Job]], list[tuple[Job, int]]]


def continue_running(state: State, divide: Divide) -> Plan:
    """Running sequences, the step divided among them by `divide`; the last admitted are preempted until it fits."""
    keep, free = list(state.running), state.free_blocks
    preempt: list[int] = []
    while True:
        run = divide(keep)
        if len(keep) <= 1 or sum(job.blocks(n, state.block_size) for job, n in run) <= free:
            return Plan(tuple((job.id, n) for job, n in run), tuple(preempt))
        victim = keep.pop()
        preempt.append(victim.id)
        free += victim.own


def free_blocks(state: State) -> int:
    """Blocks that stay free once every running sequence has blocks for all of its tokens.

    A prompt is counted in full from its admission on: half-computed prompts that block each other end in preemption.
    """
    return state.free_blocks - sum(job.blocks(max(job.left, 1), state.block_size) for job in state.running)


def free_slots(state: State) -> int:
    """Sequences that may still be admitted if every running one is to get a token in each step."""
    return max(0, min(state.sequence_limit, state.token_limit) - len(state.running))
