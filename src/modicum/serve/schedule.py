"""First phase of a step: the scheduler's plan, and room in the cache for what it runs."""

from __future__ import annotations

from modicum.serve.request import Sample, Update
from modicum.serve.schedulers import Plan
from modicum.serve.state import State
from modicum.serve.work import Work, arrange


def schedule(state: State, updates: list[Update]) -> Plan:
    """Which sequences run, and how many tokens of each."""
    hint(state)
    late = state.scheduler.waiting[0] if state.scheduler.waiting else None
    if late is not None and late.length > state.cache.capacity:  # only a policy that drops lets it get so long
        updates += state.fail(
            [state.samples[late.id].request.id],
            f"its cache was needed by others, and "
            f"{late.length} tokens are too many to compute anew in {state.cache.capacity}",
        )
    while True:
        plan = state.scheduler.plan(state.scheduler.state(state.cache.free_blocks, state.clock()))
        if plan.run or plan.preempt or not (state.cache.idle and state.scheduler.waiting) or state.scheduler.running:
            return plan
        state.cache.drop(next(iter(state.cache.idle)))  # nothing else runs, and there was no room beside it
        hint(state)


def hint(state: State) -> None:
    """Tell the scheduler what the cache holds of the jobs it could admit next."""
    for job in state.hinted:
        job.hit = job.revived = 0
    state.hinted.clear()
    free_slots = state.config.max_sequences - len(state.scheduler.running)
    if not (state.config.prefix_cache or state.cache.idle) or free_slots <= 0:
        return
    tokens = state.config.max_batch_tokens
    for job in state.scheduler.waiting[:free_slots]:
        state.cache.look_up(state.samples[job.id])
        state.hinted.append(job)
        tokens -= job.length - job.hit
        if tokens <= 0:
            break


def reserve(state: State, plan: Plan) -> list[Work]:
    """Make the plan true; returns what there is room for, which is all of it if the plan was right."""
    for id in plan.preempt:
        state.preempt(state.samples[id])
    plan = Plan(plan.run)
    # Found blocks are held before any is taken: taking could forget the ones another was promised.
    for id, _ in plan.run:
        if state.samples[id].slot < 0:
            _start(state, state.samples[id])
    state.scheduler.commit(plan)
    run, works = list(plan.run), []
    while run:
        id, n = run.pop(0)
        sample = state.samples[id]
        if sample.policy is not None and (left := sample.request.context - sample.job.computed) > 0:
            n = min(n, left)  # a step ends where the policy compresses; the rest comes in the next one
        while not state.cache.has_room(sample, n):
            late = run.pop()[0] if run else id
            state.preempt(state.samples[late])
            if late == id:
                break
        else:
            works.append(Work(sample, sample.job.computed, n))
    return arrange(works)


def _start(state: State, sample: Sample) -> None:
    state.cache.load(sample)
    if sample.job.preempted == 0:
        if sample.index == 0:
            sample.request.cached = sample.job.hit
        state.counters["prompt_tokens"] += len(sample.request.prompt)
        state.counters["cached_tokens"] += sample.job.hit
