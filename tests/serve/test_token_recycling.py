"""Reference test of drafter/token-recycling: matrix and tree by dictionaries and recursion."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from serve_tools import tiny

from modicum.serve.config import EngineConfig
from modicum.serve.drafters import EMPTY, Tree
from modicum.serve.drafters.token_recycling import CHILDREN, Config, TokenRecycling, template
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

# The paper's tree (its code's template of 80 places) by levels: the ranks on the way from the root to each place.
LEVELS = (
    "0 1 2 3 4 5 6 7",
    "00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70",
    "000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500",
    "0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000",
    "00000 00001 00002 00010 00020 00100 01000 10000",
    "000000 000001 000100",
)


def paths(nodes: int, k: int) -> list[tuple[int, ...]]:
    """Ranks from the root to every place."""
    t, found = template(nodes, k), []
    for parent, rank in zip(t.parents_N.tolist(), t.ranks_N.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), rank))
    return found


def test_the_whole_tree_is_the_papers() -> None:
    found = ["".join(map(str, path)) for path in paths(80, 8)]
    assert found == " ".join(LEVELS).split(), "level by level, each in the order of its parents"
    assert [sum(level) for level in CHILDREN] == [len(level.split()) for level in LEVELS] == [8, 21, 25, 15, 8, 3]


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


@pytest.mark.parametrize("prompts", [False, True])
def test_rejected_drafts_are_recycled(prompts: bool) -> None:
    """The row of a drafted token that was not taken is what the model would have said behind it."""
    model, prompt, k = tiny(), [1, 2, 3, 4, 5], 4
    choice = f"token-recycling:k={k},prompts={str(prompts).lower()}"
    engine = Engine(model, None, EngineConfig(cache="1ktok", drafter=choice, draft_when="always"))
    assert engine.drafting is not None
    drafter = engine.drafting.drafter
    assert isinstance(drafter, TokenRecycling)
    taken = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].tokens
    below, beside = [v for v in range(50, 60) if v not in taken][:2]
    drafter.known_V[:] = False
    tree = Tree(np.array([below, beside, taken[1]]), np.array([-1, 0, -1]))  # a wrong one, one below it, the right one
    drafter.propose = lambda tokens, budget: tree if len(tokens) == len(prompt) + 1 else EMPTY  # type: ignore
    again = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].tokens
    assert again == taken and engine.counters["accepted_tokens"] >= 1
    with torch.no_grad():
        for token, before in ((below, []), (beside, [below])):
            want = model(torch.tensor([[*prompt, taken[0], *before, token]]))[0, -1].topk(k).indices.tolist()
            assert drafter.known_V[token] and drafter.next_VK[token].tolist() == want
