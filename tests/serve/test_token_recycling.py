"""Reference test of drafter/token-recycling: matrix and tree by dictionaries and recursion."""

from __future__ import annotations

import random

import numpy as np
import torch
from serve_tools import tiny

from modicum.serve.config import EngineConfig
from modicum.serve.drafters.token_recycling import CHILDREN, Config, TokenRecycling, template
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

# Places of the paper's tree per level, and some of its paths (ranks from the root down).
LEVELS = (8, 21, 25, 15, 8, 3)
PATHS = {(0, 7), (1, 3), (7, 0), (0, 3, 0), (1, 1, 0), (5, 0, 0), (0, 1, 0, 0), (3, 0, 0, 0), (0, 0, 0, 1, 0, 0)}
NO_PATHS = {(1, 4), (3, 2), (6, 0, 0), (0, 4, 1), (4, 0, 0, 0), (0, 0, 0, 0, 0, 2), (0, 0, 1, 0, 0, 0)}


def paths(nodes: int, k: int) -> list[tuple[int, ...]]:
    """Ranks from the root to every place."""
    t, found = template(nodes, k), []
    for parent, rank in zip(t.parents_N.tolist(), t.ranks_N.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), rank))
    return found


def test_the_whole_tree_is_the_papers() -> None:
    assert all(sum(level) == n for level, n in zip(CHILDREN, LEVELS, strict=True))
    found = paths(80, 8)
    assert len(set(found)) == 80 and tuple(sum(len(p) == d for p in found) for d in range(1, 7)) == LEVELS
    levels = [sum(len(p) == d for p in found) for d in range(1, 7)]
    assert len(set(found)) == 80 and levels == list(LEVELS)
    assert [len(p) for p in found] == sorted(len(p) for p in found), "breadth first"


def test_smaller_trees_are_parts_of_larger_ones() -> None:
    for k in (1, 3, 8):
        before: set[tuple[int, ...]] = set()
        for nodes in range(1, 81):
            now = set(paths(nodes, k))
            assert before <= now and all(max(p) < k for p in now)
            assert all(p[:-1] in now for p in now if len(p) > 1), "a place without its parent"
            before = now


def test_trees_are_read_from_what_was_last_likely() -> None:
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    V, k = 23, 4
    drafter = TokenRecycling(Config(k=k, nodes=80), V)
    matrix: dict[int, list[int]] = {}
    for _ in range(30):
        seen = [rng.randrange(V) for _ in range(rng.randint(1, 6))]
        logits_TV = torch.randn(len(seen), V, generator=generator)
        drafter.observe(torch.tensor(seen), logits_TV)
        for token, row in zip(seen, logits_TV.tolist(), strict=True):  # of equal tokens the last stays
            matrix[token] = sorted(range(V), key=lambda v, row=row: -row[v])[:k]
        known = [rng.randrange(V) for _ in range(3)]
        for nodes in (5, 80):
            want: dict[tuple[int, ...], int] = {}
            for path in paths(nodes, k):
                above = known[-1] if len(path) == 1 else want.get(path[:-1])
                if above is not None and above in matrix:
                    want[path] = matrix[above][path[-1]]
            tree = drafter.propose(known, nodes)
            chains = {()}
            got = {}
            for i, (token, parent) in enumerate(zip(tree.tokens_N.tolist(), tree.parents_N.tolist(), strict=True)):
                got[i] = (*(got[parent] if parent >= 0 else ()), token)
                chains.add(got[i])
            assert len(tree) == len(want)
            assert {c for c in chains if c} == {tuple(want[p[: d + 1]] for d in range(len(p))) for p in want}


def test_two_bytes_per_candidate_where_they_suffice() -> None:
    assert TokenRecycling(Config(), 32_000).nbytes() == 32_000 * (8 * 2 + 1) < 2e6
    assert TokenRecycling(Config(), 128_000).next_VK.dtype == np.int32


def test_learns_across_requests() -> None:
    """Asked again, a question is answered in fewer passes."""
    engine = Engine(tiny(), None, EngineConfig(cache="1ktok", drafter="token-recycling:k=4", draft_when="always"))
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    accepted = []
    for _ in range(2):
        before = engine.counters["accepted_tokens"]
        engine.generate([[1, 2, 3]], params)
        accepted.append(engine.counters["accepted_tokens"] - before)
    assert accepted[1] > accepted[0] + 5
