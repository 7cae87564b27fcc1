"""Which tokens come out of a step: walking along drafted trees, level by level.

After the forward pass the engine does what it always does: sample the next token of every sequence from the logits of
its row, say it, and, where a tree was drafted below it, go on at the child that holds it, until there is none. Because
each token is drawn from the logits of exactly the tokens before it, with the sequence's own next random number,
every output is that of an engine without drafts: greedy, sampled, penalised, with stops, whatever is asked for
(Chen et al. 2023, arXiv:2302.01318, for a draft that is certain of itself). A step without drafts has one level.

A tree's tokens take the entries after a sequence's cached tokens, in the tree's own order. Afterwards the keys and
values of the accepted branch are moved to the front ones, which is where a sequence without drafts has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from modicum.serve.commit import commit
from modicum.serve.drafters import Tree
from modicum.serve.plan import AttentionPlan
from modicum.serve.request import Update
from modicum.serve.state import State
from modicum.serve.work import Work


def child(tree: Tree, node: int, token: int) -> int:
    """The place below `place` that holds `token`; 0 if there is none."""
    children = np.flatnonzero((tree.parents_N == node - 1) & (tree.tokens_N == token))
    return int(children[0]) + 1 if len(children) else 0


def rows_to_check(works: Sequence[Work]) -> tuple[list[int], dict[int, int]]:
    """Rows whose logits are wanted, and where those of each sequence begin among them."""
    rows: list[int] = []
    at: dict[int, int] = {}
    for w in works:
        known = w.n if w.tree is None else 1
        if w.start + known == w.sample.job.length and not w.sample.scored:
            first = w.at + known - 1
            at[w.sample.id] = len(rows)
            rows += range(first, w.at + w.n)
    return rows, at


def verify(
    state: State, plan: AttentionPlan, logits_RV: Tensor | None, at: dict[int, int], updates: list[Update]
) -> None:
    """Say a token of every sequence whose row has logits; go on with those that find it in their tree."""
    works, trees = plan.works, plan.trees
    here = {w.sample.id: 0 for w in trees}
    ready = [w for w in works if w.sample.id in at]
    level = [Work(w.sample, w.start, 1, w.at) if w.tree is not None else w for w in works]
    rows = [at[w.sample.id] for w in ready]
    moves: list[tuple[int, int, int]] = []  # slot, from, to
    accepted, depth = 0, 0
    if not ready:
        commit(state, level, [], None, plan.faults, updates)
    try:
        while ready:
            logits_BV = logits_RV if logits_RV is None or len(rows) == len(logits_RV) else logits_RV[rows]
            commit(state, level, [w.sample for w in ready], logits_BV, plan.faults, updates)
            depth += 1
            ready, rows = [], []
            for w in trees:
                sample, node = w.sample, here.pop(w.sample.id, -1)
                if node < 0 or sample.finish is not None:
                    continue
                assert w.tree is not None
                node = child(w.tree, node, sample.tokens[-1])
                if node:
                    here[sample.id] = node
                    ready.append(w)
                    rows.append(at[sample.id] + node)
                    if node != depth:
                        moves.append((sample.slot, w.start + node, w.start + depth))
            level = [Work(w.sample, w.start + depth, 1, w.at) for w in ready]
            accepted += len(ready)
    finally:  # what has been published above must be true, whatever happened since
        if moves:
            slots, sources, targets = zip(*moves, strict=True)
            state.cache.move(slots, sources, targets)
    for w in trees:
        if w.sample.finish is None:
            state.cache.trim(w.sample)
    drafted = sum(len(w.tree) for w in trees if w.tree is not None)
    state.counters["drafted_tokens"] += drafted
    state.counters["accepted_tokens"] += accepted
    state.counters["computed_tokens"] += drafted - accepted
