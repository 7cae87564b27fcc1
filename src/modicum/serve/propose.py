"""Drafted tokens for a step: trees below the tokens that are computed anyway.

A step with drafts gives sequences that are about to compute one token a tree below it, and runs all of it through the
decoder at once; `serve.verify` then walks along what was right. Trees take free blocks only and give them back within
the step; nothing is preempted for them. A step has at most `draft_tokens` drafted tokens, which bounds its logits too.
`serve.payoff` says when drafts cost more than they bring.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.serve.backends import Runner
from modicum.serve.cache import Cache
from modicum.serve.config import EngineConfig
from modicum.serve.drafters import Drafter, Tree, layout
from modicum.serve.kv import KVPolicy
from modicum.serve.payoff import Payoff
from modicum.serve.request import Sample
from modicum.serve.work import Work, arrange, tokens_of

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
    """A drafter's part of each step."""

    def __init__(self, drafter: Drafter, config: EngineConfig):
        self.drafter, self.config = drafter, config
        self.payoff = Payoff() if config.draft_when == "pays" else None

    def begin(self, sample: Sample) -> None:
        sample.drafter = self.drafter.begin(sample.request.prompt)

    def wanted(self, works: Sequence[Work]) -> bool:
        """Whether this step is to draft."""
        single = sum(w.n == 1 for w in works)
        return self.payoff is None or not single or self.payoff.wants(single)

    def note(self, works: Sequence[Work], drafted: bool, seconds: float, tokens: int) -> None:
        """What a step of these works (as they were planned) took and gave. With chunks among them it says nothing."""
        if self.payoff is not None and all(w.n == 1 or w.tree is not None for w in works):
            self.payoff.note(len(works), drafted, seconds, tokens)

    def propose(self, works: list[Work], cache: Cache) -> list[Work]:
        """Give tokens that are computed singly their trees, as far as there is room; returns these works."""
        config = self.config
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
            if len(tree) and not cache.has_room(sample, 1 + len(tree)):
                tree = tree.first(job.capacity - w.start - 1)
            if len(tree):
                w.tree, w.n = tree, 1 + len(tree)
                budget -= len(tree)
                trees.append(w)
        if trees:
            arrange(works)
            trees.sort(key=lambda w: w.at)
        return trees

    def withdraw(self, trees: Sequence[Work], cache: Cache) -> None:
        """Take the drafts out of a step and zero what they left."""
        for w in trees:
            cache.zero(w.sample, range(w.start + 1, w.start + w.n))
            w.tree, w.n = None, 1

    def learn(self, works: Sequence[Work], rows: Sequence[int], logits_RV: Tensor | None, runner: Runner) -> None:
        """Show the drafter logits: those of prompts' tokens a slice at a time, then those that were computed anyway."""
        if self.drafter.learns == "nothing":
            return
        tokens_T = torch.tensor(tokens_of(works))
        if self.drafter.learns == "all":
            for w in works:
                if w.tree is None and w.n > 1:
                    for first in range(w.at, w.at + w.n, ROWS):
                        last = min(first + ROWS, w.at + w.n)
                        self.drafter.observe(tokens_T[first:last], runner.logits(range(first, last)))
        if logits_RV is not None:
            self.drafter.observe(tokens_T[rows], logits_RV)


def _within(tree: Tree, depth: int) -> Tree:
    """The nodes down to a depth."""
    kept_N = layout(tree).depth_X[1:] <= depth
    new_index_N = np.append(kept_N.cumsum() - 1, -1)
    return Tree(tree.tokens_N[kept_N], new_index_N[tree.parents_N[kept_N]])
