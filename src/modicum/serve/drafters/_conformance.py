"""What must hold for any drafter: proper trees within the budget, unchanged outputs, all memory given back."""

from __future__ import annotations

import random

import torch

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.drafters import Drafter, Tree
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

VOCAB = 64
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.7, top_k=5, seed=3, max_tokens=16, ignore_eos=True)
PROMPTS = [[5, 9, 2, 7] * 6, list(range(1, 40)), [3], [5, 9, 2, 7] * 6 + [1, 2]]


def _choice(key: str) -> Choice:
    toy = getattr(registry.load("drafter", key).module, "TOY", None)
    return Choice("drafter", key, vars(toy) if toy is not None else {})


def _engine(key: str, **more: object) -> Engine:
    shape = llama_like(VOCAB, 32, 2, heads=4, kv_heads=2, context_length=128)
    model = Decoder(shape, torch.Generator().manual_seed(3))
    with torch.no_grad():  # livelier than a fresh initialisation, whose outputs hardly differ
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(4.0)
    config = {"block_size": 4, "cache": "400tok", "drafter": _choice(key)} | more
    return Engine(model, None, EngineConfig(**config))  # type: ignore[arg-type]


def _check_tree(tree: Tree, budget: int) -> None:
    assert len(tree) <= budget, f"{len(tree)} nodes, {budget} were asked for"
    tokens, parents = tree.tokens_N.tolist(), tree.parents_N.tolist()
    assert len(tokens) == len(parents), f"{len(tokens)} tokens and {len(parents)} parents"
    assert all(0 <= t < VOCAB for t in tokens), "a drafted token does not exist"
    assert all(-1 <= p < i for i, p in enumerate(parents)), "a parent must come before its child"
    edges = list(zip(parents, tokens, strict=True))
    assert len(set(edges)) == len(edges), "two nodes of one parent have the same token"


def check_trees(key: str) -> None:
    """Whatever was seen, a proposal is a tree of existing tokens within the budget, and the same when asked again."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    shared: Drafter = registry.build("drafter", _choice(key), VOCAB)
    for turn in range(12):
        span = rng.choice((2, 8, VOCAB))  # few different tokens: many repetitions
        known = [rng.randrange(span) for _ in range(rng.choice((1, 2, 30)))]
        drafter = shared.begin(list(known))
        for _ in range(10):
            for budget in (0, 1, rng.randrange(2, 100)):
                tree = drafter.propose(known, budget)
                _check_tree(tree, budget)
                again = drafter.propose(known, budget)
                assert tree.tokens_N.tolist() == again.tokens_N.tolist(), "asked twice, two answers"
            if shared.learns != "nothing":
                seen = torch.randint(span, (rng.randint(1, 20),), generator=generator)
                shared.observe(seen, torch.randn(len(seen), VOCAB, generator=generator))
            known += [rng.randrange(span) for _ in range(rng.randint(1, 5))]
        assert turn > 0 or not drafter.drafts or drafter.propose([1] * 9, 0).tokens_N.size == 0


def check_state_does_not_grow(key: str) -> None:
    """What is shared is as large at the end as at the start."""
    drafter: Drafter = registry.build("drafter", _choice(key), VOCAB)
    before = drafter.nbytes()
    for seed in range(20):
        logits_TV = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(seed))
        drafter.observe(torch.arange(50), logits_TV)
    assert drafter.nbytes() == before, f"{drafter.nbytes()} bytes after {before}"


def check_outputs_do_not_change(key: str) -> None:
    """Greedy and sampled, alone and in company, with every mode of the cache, asked a second time."""
    modes: tuple[dict[str, object], ...] = (
        {"prefix_cache": False, "max_sequences": 1},
        {},
        {"chunked_prefill": True, "max_batch_tokens": 24},
        {"cache": "60tok"},
    )
    for params in (GREEDY, SAMPLED):
        want = [o.tokens for o in _engine("none").generate(PROMPTS, params)]
        for mode in modes:
            engine = _engine(key, draft_when="always", **mode)
            for turn in ("first", "second"):
                got = [o.tokens for o in engine.generate(PROMPTS, params)]
                assert got == want, f"{mode}, {turn} turn, temperature {params.temperature}: outputs differ"
            assert engine.blocks.free == engine.blocks.n_blocks, f"{mode}: blocks are held after the end"
            engine.blocks.check()


def check_memory_comes_back(key: str) -> None:
    """Between steps a sequence holds blocks for what is computed and no more; after an abort, none."""
    engine = _engine(key, draft_when="always")
    for update in engine.stream(PROMPTS[0] * 2, GREEDY):
        for sample in engine.samples.values():
            needed = -(-sample.job.computed // 4)
            assert len(sample.blocks) <= needed, f"{len(sample.blocks)} blocks are held, {needed} are needed"
        if len(update.tokens) and len(engine.samples) and next(iter(engine.samples.values())).job.length > 56:
            break
    assert engine.blocks.free == engine.blocks.n_blocks, "blocks are held after an abort"
    engine.blocks.check()
