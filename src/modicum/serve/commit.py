"""Last phase of a step: what was computed is booked, tokens are sampled and said, finished sequences end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from modicum.serve.request import Sample, Update
from modicum.serve.sampling import Choices, choose
from modicum.serve.state import State
from modicum.serve.work import Work


def commit(
    state: State,
    works: Sequence[Work],
    samples: Sequence[Sample],
    logits_BV: Tensor | None,
    faults: dict[int, Exception],
    updates: list[Update],
) -> None:
    """Book what was computed, sample the next token of `samples`, end what is finished.

    `faults`: exceptions of policies, by sequence, from the step's plan; each ends its own request.
    """
    chosen = choose(logits_BV, samples) if logits_BV is not None else Choices([], [], {})
    broken = {s.id for s, ok in zip(samples, chosen.finite, strict=True) if not ok}
    for w in works:
        sample = w.sample
        state.counters["computed_tokens"] += w.n
        state.scheduler.advance(sample.id, w.n, 0)
        if sample.pages is not None:
            sample.pages.count_LG += w.n
        if sample.id not in broken and sample.id not in faults:
            state.cache.publish(sample)
            try:
                if state.policy.drops and not state.cache.thin(sample, w.n):
                    state.preempt(sample)
            except Exception as error:
                faults[sample.id] = error
    for w in works:
        if (fault := faults.pop(w.sample.id, None)) is not None:
            updates += state.failed({w.sample.request.id}, fault)
    now = state.clock()
    for i, sample in enumerate(samples):
        if sample.id in broken:
            updates += state.fail([sample.request.id], "the model's output is not a number (NaN or infinite)")
        elif sample.finish is None:
            state.scheduler.advance(sample.id, 0, 1)
            try:
                updates.append(_emit(state, sample, chosen.tokens[i], chosen.logprobs.get(i), now))
            except Exception as error:  # a tokenizer that cannot decode is this request's trouble alone
                updates += state.failed({sample.request.id}, error)


def _emit(state: State, sample: Sample, token: int, logprob: Any, now: float) -> Update:
    """Append a sampled token; end the sequence if it was the last."""
    first = sample.first_token is None
    sample.first_token, sample.last_token = sample.first_token or now, now
    sample.tokens.append(token)
    state.counters["generated_tokens"] += 1
    update = Update(sample.request.id, sample.index, tokens=[token], logprobs=[logprob] if logprob else [])
    if first:
        update.cached = sample.request.cached
        state.start_siblings(sample)
    if sample.penalties is not None:
        sample.penalties.add(token)
    if sample.matcher is not None:
        sample.matcher.advance(token)
    if token in sample.stops:
        update.finish = "stop"
    else:
        if sample.stream is not None:
            update.text = sample.stream.push(token)
            if sample.stream.stopped is not None:
                update.finish = "stop"
        if update.finish is None and sample.matcher is not None and sample.matcher.finished:
            update.finish = "stop"
        if update.finish is None and len(sample.tokens) >= sample.limit:
            update.finish = "length"
    if update.finish:
        if sample.stream is not None:
            update.text += sample.stream.finish()
            if sample.stream.stopped is not None:  # what was held back can complete a stop string
                update.finish = "stop"
        state.end(sample, update.finish)
    return update
