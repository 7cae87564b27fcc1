"""Drafting changes no output: trees with the right branch hidden in them, in every mode of the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from modicum.core.errors import UserError
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.drafters import Drafter, Tree
from modicum.serve.engine import Engine
from modicum.serve.request import Output, SamplingParams
from modicum.serve.trees import child, layout
from serve_tools import assert_clean, lively, tiny, tokenizer

PROMPTS = [[random.Random(i).randrange(1, 400) for _ in range(n)] for i, n in enumerate((1, 3, 16, 17, 40, 33, 70))]
PROMPTS.append([*PROMPTS[4][:32], 5, 6, 7])
MODES: dict[str, dict[str, Any]] = {
    "plain": {"prefix_cache": False},
    "prefix": {},
    "chunked": {"chunked_prefill": True, "max_batch_tokens": 24},
    "one by one": {"prefix_cache": False, "max_sequences": 1},
    "crowded": {"cache": "112tok"},
    "few drafts": {"draft_tokens": 7},
    "crowded, chunked": {"cache": "112tok", "chunked_prefill": True, "max_batch_tokens": 40},
}


class Oracle(Drafter):
    """Knows what will be said, hides it in random trees of wrong tokens, and is now and then wrong itself."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], seed: int = 0, vocab: int = 400):
        super().__init__(None, vocab)
        self.answers, self.rng = answers, random.Random(seed)

    def begin(self, prompt: Sequence[int]) -> Oracle:
        twin = Oracle(self.answers, self.rng.randrange(1 << 30), self.vocab_size)
        twin.prompt = tuple(prompt)  # type: ignore[attr-defined]
        return twin

    def propose(self, tokens: Sequence[int], budget: int) -> Tree:
        rng, answer = self.rng, self.answers[self.prompt]  # type: ignore[attr-defined]
        right = answer[len(tokens) - len(self.prompt) :][: rng.randint(0, 8)]  # type: ignore[attr-defined]
        drafted: list[int] = []
        parents: list[int] = []
        here, true = -1, 0
        for _ in range(rng.randint(0, min(budget, 30))):
            if true < len(right) and rng.random() < 0.4:
                parent, token = here, right[true]
            else:
                parent, token = rng.randint(-1, len(drafted) - 1), rng.randrange(self.vocab_size)
            if any(p == parent and t == token for p, t in zip(parents, drafted, strict=True)):
                continue
            parents.append(parent)
            drafted.append(token)
            if true < len(right) and parent == here and token == right[true]:
                here, true = len(drafted) - 1, true + 1
        return Tree(np.array(drafted, dtype=np.int64), np.array(parents, dtype=np.int64))


def both(model: Decoder, params: SamplingParams, tok: Any = None, **config: Any) -> tuple[list[Output], Engine, list[Output]]:
    """Outputs without drafts, and an engine with an oracle that knows them, with its outputs."""
    settings: dict[str, Any] = {"block_size": 8, "cache": "2ktok"} | config
    plain = Engine(model, tok, EngineConfig(**settings))
    want = plain.generate(PROMPTS, params)
    answers = {tuple(p): o.tokens for p, o in zip(PROMPTS, want, strict=True)}
    drafting = Engine(model, tok, EngineConfig(**settings, drafter="prompt-lookup"))
    assert drafting.drafting is not None
    drafting.drafting.drafter = Oracle(answers)
    return want, drafting, drafting.generate(PROMPTS, params)


def tokens(outputs: list[Output]) -> list[list[list[int]]]:
    return [[c.tokens for c in o.completions] for o in outputs]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_output_is_that_without_drafts(mode: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=24, ignore_eos=True)
    want, drafting, got = both(tiny(), params, **MODES[mode])
    assert tokens(got) == tokens(want)
    assert drafting.counters["accepted_tokens"] > 60
    stats = drafting.stats()
    assert stats["tokens_per_forward"] > 1.3
    assert (stats["preemptions"] > 0) == mode.startswith("crowded")
    again = drafting.generate(PROMPTS, params)
    assert tokens(again) == tokens(want), "the prefix cache holds something else now"
    assert_clean(drafting)
