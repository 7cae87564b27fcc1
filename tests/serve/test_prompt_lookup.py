"""Reference test of drafter/prompt-lookup: transformers' candidates for the same tokens."""

from __future__ import annotations

import random

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from modicum.serve.drafters.prompt_lookup import Config, PromptLookup


def test_drafts_are_those_of_transformers() -> None:
    rng = random.Random(0)
    drafted = 0
    for _ in range(150):
        config = Config(ngram=rng.randint(1, 4), length=rng.randint(1, 12))
        theirs = PromptLookupCandidateGenerator(
            max_matching_ngram_size=config.ngram, num_output_tokens=config.length, max_length=1000
        )
        known = [rng.randrange(6) for _ in range(rng.randint(1, 60))]
        drafter = PromptLookup(config, 6).begin(known)
        for _ in range(8):
            want = theirs.get_candidates(torch.tensor([known]))[0][0, len(known) :].tolist()
            tree = drafter.propose(known, 50)
            assert tree.tokens_N.tolist() == want
            assert tree.parents_N.tolist() == list(range(-1, len(want) - 1))
            drafted += len(want)
            known += [rng.randrange(6) for _ in range(rng.randint(1, 70))]
    assert drafted > 1000


def test_budget_cuts_the_draft() -> None:
    drafter = PromptLookup(Config(), 10).begin([])
    assert drafter.propose([1, 2, 3, 4, 1, 2], 1).tokens_N.tolist() == [3]
    assert len(drafter.propose([1, 2, 3, 4, 1, 2], 0)) == 0
