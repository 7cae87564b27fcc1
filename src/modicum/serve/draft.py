"""Drafting in the engine: trees under the tokens that are computed anyway, and walking along them.

A step with drafts gives sequences that are about to compute one token a tree below it, runs all of it through the
decoder at once, and then does what the engine always does, level by level: sample the next token of every sequence
from the logits of its place in the tree, say it, and go on at the child that holds it, until there is none. Because
each token is drawn from the logits of exactly the tokens before it, with the sequence's own next random number,
every output is that of an engine without drafts: greedy, sampled, penalised, with stops, whatever is asked for
(Chen et al. 2023, arXiv:2302.01318, for a draft that is certain of itself).

Trees take free blocks only and give them back within the step; nothing is preempted for them. A step has at most
`draft_tokens` drafted tokens, which bounds its logits too. `serve.payoff` says when drafts cost more than they bring.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.serve.config import EngineConfig
from modicum.serve.drafters import Drafter, Tree, layout
from modicum.serve.kv import KVPolicy
from modicum.serve.payoff import Payoff
from modicum.serve.request import Sample, Update
from modicum.serve.scoring import score
from modicum.serve.trees import child, move
from modicum.serve.work import Work, arrange, tokens_of

if TYPE_CHECKING:
    from modicum.serve.engine import Engine

COUNTERS = ("drafted_tokens", "accepted_tokens")
ROWS = 256  # prompt tokens whose logits exist at a time, for a drafter that learns from them


def make_drafter(config: EngineConfig, vocab_size: int, policy: KVPolicy) -> Drafter | None:
    """None for a method that drafts nothing. Raises `UserError` for a policy that drafts cannot go with."""
    drafter: Drafter = registry.build("drafter", config.drafter, vocab_size)
    if not drafter.drafts:
        return None
    if policy.drops or policy.observes or policy.marks:
        raise UserError(
            f"drafter={config.drafter} cannot be combined with kv={config.kv}, which would see or keep tokens that are "
            "taken back; choose kv=full, or drafter=none"
        )
    return drafter


class Drafting:
    """Steps of an engine that has a drafter."""

    def __init__(self, engine: Engine, drafter: Drafter):
        self.engine, self.drafter = engine, drafter
        self.payoff = Payoff() if engine.config.draft_when == "pays" else None

    def begin(self, sample: Sample) -> None:
        sample.drafter = self.drafter.begin(sample.request.prompt)

    def run(self, works: list[Work], updates: list[Update]) -> None:
        """In place of the engine's own `_run`: with drafts, or without while they do not pay."""
        single = sum(w.n == 1 for w in works)
        if self.payoff is None or not single:
            self._run(works, updates, True)
            return
        drafts = self.payoff.wants(single)
        if single < len(works):  # pieces of prompts among them: says nothing of either
            self._run(works, updates, drafts)
            return
        start, before = time.perf_counter(), self.engine.counters["generated_tokens"]
        if drafts:
            self._run(works, updates, True)
        else:
            self.engine._run(works, updates)
        generated = self.engine.counters["generated_tokens"] - before
        self.payoff.note(single, drafts, time.perf_counter() - start, generated)

    def _run(self, works: list[Work], updates: list[Update], drafts: bool) -> None:
        engine, drafter = self.engine, self.drafter
        trees = self._extend(works) if drafts else []
        if not trees and drafter.learns == "nothing":
            engine._run(works, updates)
            return
        rows, at = _rows(works)
        logits_RV = engine.runner(works, rows)
        if trees and logits_RV is not None and not math.isfinite(float(logits_RV.sum())):
            # Perhaps a guess no one asked for: the step is done again without any, and nothing of them stays.
            self._withdraw(trees)
            engine._run(arrange(works), updates)
            return
        if drafter.learns != "nothing":
            tokens_T = torch.tensor(tokens_of(works))
            if drafter.learns == "all":
                self._learn(works, tokens_T)
            if logits_RV is not None:
                drafter.observe(tokens_T[rows], logits_RV)
        self._walk(works, trees, logits_RV, at, updates)
        score(engine, works, updates)

    def _extend(self, works: list[Work]) -> list[Work]:
        """Give tokens that are computed singly their trees, as far as there is room; returns these works."""
        config = self.engine.config
        single = [w for w in works if w.n == 1 and w.start + 1 == w.sample.job.length and not w.sample.scored]
        budget = min(config.draft_tokens, config.max_batch_tokens - sum(w.n for w in works))
        trees = []
        for i, w in enumerate(single):
            sample, job = w.sample, w.sample.job
            deepest = sample.limit - len(sample.tokens) - 1  # a node below would follow the last token
            each = budget // (len(single) - i)
            if deepest < 1 or each < 1:
                continue
            tree: Tree = sample.drafter.propose(sample.tokens, each)
            if len(tree) and int(layout(tree).depth_X.max()) > deepest:
                tree = _within(tree, deepest)
            if len(tree) and not self.engine.cache.room(sample, 1 + len(tree)):
                tree = tree.first(job.capacity - w.start - 1)
            if len(tree):
                w.tree, w.n = tree, 1 + len(tree)
                budget -= len(tree)
                trees.append(w)
        if trees:
            arrange(works)
            trees.sort(key=lambda w: w.at)
        return trees

    def _learn(self, works: Sequence[Work], tokens_T: Tensor) -> None:
        """Show the drafter the logits of prompts' tokens, a slice at a time (their last one is in `run`)."""
        for w in works:
            if w.tree is None and w.n > 1:
                for first in range(w.at, w.at + w.n, ROWS):
                    last = min(first + ROWS, w.at + w.n)
                    self.drafter.observe(tokens_T[first:last], self.engine.runner.logits(range(first, last)))

    def _walk(
        self, works: list[Work], trees: list[Work], logits_RV: Tensor | None, at: dict[int, int], updates: list[Update]
    ) -> None:
        """Say a token of every sequence whose place has logits; go on with those that find it in their tree."""
        engine = self.engine
        here = {w.sample.id: 0 for w in trees}
        ready = [w for w in works if w.sample.id in at]
        level = [Work(w.sample, w.start, 1, w.at) if w.tree is not None else w for w in works]
        rows = [at[w.sample.id] for w in ready]
        moves: list[tuple[int, int, int]] = []
        accepted, depth = 0, 0
        try:
            while ready:
                logits_BV = logits_RV if logits_RV is None or len(rows) == len(logits_RV) else logits_RV[rows]
                engine._commit(level, [w.sample for w in ready], logits_BV, updates)
                depth += 1
                ready, rows = [], []
                for w in trees:
                    sample, place = w.sample, here.pop(w.sample.id, -1)
                    if place < 0 or sample.finish is not None:
                        continue
                    assert w.tree is not None
                    place = child(w.tree, place, sample.tokens[-1])
                    if place:
                        here[sample.id] = place
                        ready.append(w)
                        rows.append(at[sample.id] + place)
                        if place != depth:
                            moves.append((sample.slot, w.start + place, w.start + depth))
                level = [Work(w.sample, w.start + depth, 1, w.at) for w in ready]
                accepted += len(ready)
            if not at:
                engine._commit(level, [], None, updates)
        finally:  # what has been published above must be true, whatever happened since
            if moves:
                slots, sources, targets = zip(*moves, strict=True)
                flat = engine.cache.attend.flat
                move(engine.storage, flat(slots, sources), flat(slots, targets))
        for w in trees:
            if w.sample.finish is None:
                engine.cache.trim(w.sample)
        drafted = sum(len(w.tree) for w in trees if w.tree is not None)
        engine.counters["drafted_tokens"] += drafted
        engine.counters["accepted_tokens"] += accepted
        engine.counters["computed_tokens"] += drafted - accepted

    def _withdraw(self, trees: list[Work]) -> None:
        """Take the drafts out of a step and zero what they left."""
        attend, storage = self.engine.cache.attend, self.engine.storage
        for w in trees:
            rows = attend.flat([w.sample.slot] * (w.n - 1), range(w.start + 1, w.start + w.n))
            for x_LGNPE in (storage.k_LGNPE, storage.v_LGNPE):
                x_LGNPE.flatten(2, 3).index_fill_(2, rows, 0)
            w.tree, w.n = None, 1


def _rows(works: Sequence[Work]) -> tuple[list[int], dict[int, int]]:
    """Row places whose logits are wanted, and where those of each sequence begin among them."""
    rows: list[int] = []
    at: dict[int, int] = {}
    for w in works:
        known = w.n if w.tree is None else 1
        if w.start + known == w.sample.job.length and not w.sample.scored:
            first = w.at + known - 1
            at[w.sample.id] = len(rows)
            rows += range(first, w.at + w.n)
    return rows, at


def _within(tree: Tree, depth: int) -> Tree:
    """The nodes down to a depth."""
    kept_N = layout(tree).depth_X[1:] <= depth
    place_N = np.append(kept_N.cumsum() - 1, -1)
    return Tree(tree.tokens_N[kept_N], place_N[tree.parents_N[kept_N]])
