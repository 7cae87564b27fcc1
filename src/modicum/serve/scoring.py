"""Scoring given continuations: their tokens' log-probabilities, computed like prompts.

A sequence that is scored knows all of its tokens from the start, so one pass gives the logits of every place; those
of the prompt's last token and of all but the last token of the continuation are read, a slice at a time. The
request's first sequence computes the prompt, and its other ones find that in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modicum.serve.request import Sample, TokenLogprob, Update
from modicum.serve.state import State
from modicum.serve.work import Work

ROWS = 128  # rows whose logits exist at a time


def follow(sample: Sample, at_once: bool) -> None:
    """Let a new sequence follow its request's continuation instead of sampling."""
    prompt = len(sample.request.prompt)
    sample.given = sample.request.continuations[sample.index]
    sample.limit, sample.stops = prompt + len(sample.given), frozenset()
    if at_once:
        sample.scored = True
        sample.tokens += sample.given
        sample.job.prompt = sample.job.length = sample.limit - 1  # the last token's own logits are not asked for


def score(state: State, works: Sequence[Work], updates: list[Update]) -> None:
    """Read the scored sequences' log-probabilities off the step that ran last, and end those that are complete."""
    rows: list[int] = []
    row_targets: list[tuple[Sample, int]] = []  # of each row, the sequence and which token of `given` it scores
    ours = [w for w in works if w.sample.scored and w.sample.finish is None]
    for w in ours:
        first = len(w.sample.request.prompt) - 1
        # What was scored before a preemption is computed again and need not be read again.
        start = max(w.start, first + len(w.sample.scores))
        for token_index in range(start, w.start + w.n):
            rows.append(w.at + token_index - w.start)
            row_targets.append((w.sample, token_index - first))
    broken = set()
    for at in range(0, len(rows), ROWS):
        some = row_targets[at : at + ROWS]
        logits_RV = state.runner.logits(rows[at : at + ROWS])
        logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
        target_R1 = torch.tensor([[s.given[i]] for s, i in some], device=logits_RV.device)
        best = logits_RV.max(1)
        norm_R = logits_RV.logsumexp(1)
        chosen = (logits_RV.gather(1, target_R1)[:, 0] - norm_R).tolist()
        top, top_token = (best.values - norm_R).tolist(), best.indices.tolist()
        finite = torch.isfinite(norm_R).tolist()
        for r, (sample, i) in enumerate(some):
            if not finite[r]:
                broken.add(sample.request.id)
            sample.scores.append(TokenLogprob(sample.given[i], chosen[r], [(top_token[r], top[r])]))
    if broken:
        updates += state.fail(broken, "the model's output is not a number (NaN or infinite)")
    for w in ours:
        sample = w.sample
        if sample.finish is None and len(sample.scores) == len(sample.given):
            sample.first_token = sample.last_token = state.clock()
            updates.append(
                Update(
                    sample.request.id,
                    sample.index,
                    tokens=list(sample.given),
                    logprobs=sample.scores,
                    finish="length",
                    cached=sample.request.cached,
                )
            )
            state.start_siblings(sample)
            state.end(sample, "length")
