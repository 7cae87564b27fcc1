"""Drafting changes no output: trees with the right branch hidden in them, in every mode of the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serve_tools import assert_clean, lively, tiny, tokenizer

from modicum.core.errors import ModicumError, UserError
from modicum.model.config import by_layer, llama_like
from modicum.model.decoder import Decoder
from modicum.serve import native
from modicum.serve.backends.torch import Torch
from modicum.serve.config import EngineConfig
from modicum.serve.drafters import Drafter, Tree, layout
from modicum.serve.engine import Engine
from modicum.serve.payoff import Payoff
from modicum.serve.propose import make_drafter
from modicum.serve.request import Output, SamplingParams
from modicum.serve.verify import child

needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"no kernels: {native.reason()}")
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


def both(
    model: Decoder, params: SamplingParams, tok: Any = None, **config: Any
) -> tuple[list[Output], Engine, list[Output]]:
    """Outputs without drafts, and an engine with an oracle that knows them, with its outputs."""
    settings: dict[str, Any] = {"block_size": 8, "cache": "2ktok"} | config
    plain = Engine(model, tok, EngineConfig(**settings))
    want = plain.generate(PROMPTS, params)
    answers = {tuple(p): o.tokens for p, o in zip(PROMPTS, want, strict=True)}
    drafting = with_drafter(model, tok, Oracle(answers), **settings)
    return want, drafting, drafting.generate(PROMPTS, params)


def with_drafter(model: Decoder, tok: Any, drafter: Drafter, **settings: Any) -> Engine:
    engine = Engine(model, tok, EngineConfig(**settings, drafter="prompt-lookup", draft_when="always"))
    assert engine.drafting is not None
    engine.drafting.drafter = drafter
    return engine


def tokens(outputs: list[Output]) -> list[list[list[int]]]:
    return [[c.tokens for c in o.completions] for o in outputs]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_output_is_that_without_drafts(mode: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=24, ignore_eos=True)
    want, drafting, got = both(tiny(), params, **MODES[mode])
    assert tokens(got) == tokens(want)
    stats = drafting.stats()
    least = 10 if mode == "few drafts" else 30
    assert stats["accepted_tokens"] > least and stats["tokens_per_forward"] > 1 + least / 300
    assert stats["drafted_tokens"] > stats["accepted_tokens"]
    assert (stats["preemptions"] > 0) == mode.startswith("crowded")
    again = drafting.generate(PROMPTS, params)
    assert tokens(again) == tokens(want), "the prefix cache holds something else now"
    assert_clean(drafting)


@pytest.mark.parametrize("windows", [(9, None, 5), (3, 3, 3)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_windows_and_softcaps(windows: tuple[int | None, ...], softcap: float | None) -> None:
    """A tree is deeper than a window of three: what a node sees follows positions, not places."""
    shape = llama_like(
        400,
        32,
        3,
        heads=4,
        kv_heads=2,
        context_length=256,
        overrides=by_layer(window=windows),
        attention_softcap=softcap,
    )
    model = lively(Decoder(shape, torch.Generator().manual_seed(1)))
    want, drafting, got = both(model, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    assert tokens(got) == tokens(want)
    assert drafting.stats()["tokens_per_forward"] > 1.2


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("windows", [(None, None, None), (None, 31, 9)])
def test_drafts_through_the_kernels_change_no_bit(
    dtype: torch.dtype, windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log probabilities are equal, not near: a drafted token's sums run in the order of a sequence without drafts."""
    shape = llama_like(
        400, 64, 3, heads=4, kv_heads=2, context_length=256, overrides=by_layer(window=windows), attention_softcap=9.0
    )
    model = lively(Decoder(shape, torch.Generator().manual_seed(3))).to(dtype)

    def refuse(*_: Any) -> None:
        raise AssertionError("a step ran without the kernels")

    monkeypatch.setattr(Torch, "__call__", refuse)
    want, drafting, got = both(model, SamplingParams(temperature=0, max_tokens=24, logprobs=3, ignore_eos=True))
    assert tokens(got) == tokens(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.completions[0].logprobs == theirs.completions[0].logprobs
    assert drafting.stats()["tokens_per_forward"] > 1.1


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_other_families(kind: str, tmp_path: Path) -> None:
    """Learned positions (of depths, not of places), embedding scales, softcaps, pairs of norms."""
    import transformers

    from modicum.model.folder import load_model

    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        head_dim=8,
        sliding_window=9,
    )
    config.initializer_range = 0.3
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    want, _, got = both(load_model(tmp_path), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    assert tokens(got) == tokens(want)


PARAMS = {
    "several samples": SamplingParams(n=3, seed=1, max_tokens=15, ignore_eos=True),
    "penalties": SamplingParams(
        temperature=0,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        max_tokens=24,
        ignore_eos=True,
    ),
    "logprobs": SamplingParams(temperature=0.8, seed=2, logprobs=3, max_tokens=24, ignore_eos=True),
    "filters": SamplingParams(temperature=1.3, top_k=20, top_p=0.8, min_p=0.02, seed=4, max_tokens=24, ignore_eos=True),
    "bias": SamplingParams(temperature=0, logit_bias={7: 4.0, 9: 3.0}, max_tokens=24, ignore_eos=True),
    "one token": SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
    "two tokens": SamplingParams(temperature=0, max_tokens=2, ignore_eos=True),
    "to the end": SamplingParams(temperature=0, max_tokens=None, ignore_eos=True),
}


@pytest.mark.parametrize("name", PARAMS)
def test_whatever_is_asked_for(name: str) -> None:
    want, drafting, got = both(tiny(context_length=100), PARAMS[name], tokenizer())
    assert tokens(got) == tokens(want)
    for a, b in zip(want, got, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            assert (x.text, x.finish) == (y.text, y.finish)
            assert [(p.token, [t for t, _ in p.top]) for p in x.logprobs] == [
                (p.token, [t for t, _ in p.top]) for p in y.logprobs
            ]
            assert [p.logprob for p in x.logprobs] == pytest.approx([p.logprob for p in y.logprobs], abs=1e-4)
    assert_clean(drafting)


def test_stops_within_a_tree() -> None:
    """Stop tokens and stop strings end an answer in the middle of an accepted branch."""
    free = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    model, tok = tiny(), tokenizer()
    said = Engine(model, tok, EngineConfig(block_size=8, cache="2ktok")).generate(PROMPTS, free)
    stop_ids = tuple({o.tokens[7] for o in said})
    strings = tuple(tok.decode(o.tokens[5:7]) for o in said)[:4]
    for params in (
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=stop_ids),
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=tuple(s for s in strings if s)),
    ):
        want, drafting, got = both(model, params, tok)
        # The oracle goes on past the stop, as drafters do.
        assert drafting.drafting is not None
        drafting.drafting.drafter = Oracle({tuple(p): o.tokens for p, o in zip(PROMPTS, said, strict=True)}, 3)
        again = drafting.generate(PROMPTS, params)
        for outputs in (got, again):
            assert [(o.text, o.tokens, o.finish) for o in outputs] == [(o.text, o.tokens, o.finish) for o in want]
        assert any(o.finish == "stop" for o in want)
        assert_clean(drafting)


class Fixed(Drafter):
    """Always the same tree."""

    def __init__(self, tree: Tree):
        super().__init__(None, 0)
        self.tree = tree

    def propose(self, tokens: Sequence[int], budget: int) -> Tree:
        return self.tree.first(budget)


def test_sampled_pairs_have_the_models_distribution() -> None:
    """Chi-square of two sampled tokens against the exact distribution, with a tree that is often right."""
    shape = llama_like(12, 16, 1, heads=2, context_length=64)
    model = lively(Decoder(shape, torch.Generator().manual_seed(5)), 2.0)
    prompt, n = [3, 1, 4], 6000
    with torch.inference_mode():
        first = model(torch.tensor([prompt]))[0, -1].softmax(-1)
        pairs = torch.tensor([[*prompt, t, u] for t in range(12) for u in range(12)])
        after, third = (model(pairs)[:, place].softmax(-1).unflatten(0, (12, 12)) for place in (3, 4))
        after = after[:, 0]  # the second token's, below each first one
    want = (first[:, None] * after).double()
    want_last = torch.einsum("tu,tuv->v", want, third.double())
    # Under any last token: all first candidates, and below some of them others.
    tree = Tree(
        np.array([*range(0, 12, 2), *range(6), *range(3)]), np.array([-1] * 6 + [0] * 6 + [1] * 3, dtype=np.int64)
    )
    engine = with_drafter(model, None, Fixed(tree), cache="4ktok", max_sequences=64, block_size=8, draft_tokens=2000)
    params = [
        SamplingParams(n=100, max_tokens=3, ignore_eos=True, temperature=1.0, seed=seed) for seed in range(n // 100)
    ]
    outputs = engine.generate([prompt] * len(params), params)
    drawn = torch.tensor([c.tokens for o in outputs for c in o.completions])
    assert engine.counters["accepted_tokens"] > n // 4
    seen = torch.zeros(12, 12, dtype=torch.float64)
    seen.index_put_((drawn[:, 0], drawn[:, 1]), torch.ones(len(drawn), dtype=torch.float64), accumulate=True)
    _chi_square(seen.flatten(), want.flatten() * n)
    _chi_square(torch.bincount(drawn[:, 2], minlength=12).double(), want_last * n)


def _chi_square(seen: torch.Tensor, expected: torch.Tensor) -> None:
    from scipy.stats import chi2

    large = expected >= 5
    seen = torch.cat([seen[large], seen[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    statistic = float(((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    assert statistic < float(chi2.ppf(0.9999, len(seen) - 1)), f"{statistic} with {len(seen) - 1} degrees of freedom"


def test_a_guess_that_breaks_the_model_breaks_nothing() -> None:
    """A token whose embedding is not a number is drafted and never said: the step is done again without it."""
    shape = llama_like(400, 32, 2, heads=4, kv_heads=2, context_length=256, tied=False)
    model = lively(Decoder(shape, torch.Generator().manual_seed(0)))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    want = Engine(model, None, EngineConfig(block_size=8, cache="2ktok")).generate(PROMPTS, params)
    unsaid = min(set(range(400)) - {t for p, o in zip(PROMPTS, want, strict=True) for t in (*p, *o.tokens)})
    with torch.no_grad():
        model.embed.weight[unsaid] = float("nan")
    tree = Tree(np.array([5, unsaid, 6]), np.array([-1, -1, 1]))
    engine = with_drafter(model, None, Fixed(tree), block_size=8, cache="2ktok")
    got = engine.generate(PROMPTS, params)
    assert tokens(got) == tokens(want)
    assert engine.counters["failures"] == 0
    assert bool(torch.isfinite(engine.storage.k_LGNPE).all() and torch.isfinite(engine.storage.v_LGNPE).all())
    assert_clean(engine)


def test_a_failing_drafter_ends_its_requests_and_not_the_engine() -> None:
    class Broken(Fixed):
        def propose(self, tokens: Sequence[int], budget: int) -> Tree:
            raise RuntimeError("no guess")

    engine = with_drafter(tiny(), None, Broken(Tree(np.array([1]), np.array([-1]))), block_size=8, cache="2ktok")
    with pytest.raises(ModicumError, match="no guess"):
        engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4))
    assert_clean(engine)


def test_what_a_turn_said_is_found_by_the_next() -> None:
    """Blocks filled by accepted drafts hold what their names say."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    want, drafting, _ = both(tiny(), params)
    follow = [[*p, *o.tokens, 3] for p, o in zip(PROMPTS, want, strict=True)]
    short = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    fresh = Engine(drafting.model, None, EngineConfig(block_size=8, cache="2ktok")).generate(follow, short)
    assert drafting.drafting is not None
    drafting.drafting.drafter = Oracle({tuple(p): o.tokens for p, o in zip(follow, fresh, strict=True)})
    found = drafting.generate(follow, short)
    assert tokens(found) == tokens(fresh)
    for output, prompt in zip(found, follow, strict=True):
        assert output.cached_tokens >= (len(prompt) - 2) // 8 * 8


def test_policies_that_drop_are_refused() -> None:
    class Dropping:
        drops, observes = True, False

    with pytest.raises(UserError, match="cannot be combined with kv"):
        make_drafter(EngineConfig(drafter="prompt-lookup"), 10, Dropping())  # type: ignore[arg-type]
    assert make_drafter(EngineConfig(), 10, Dropping()) is None  # type: ignore[arg-type]
    for bad in ({"draft_when": "often"}, {"draft_tokens": 0}, {"drafter": "promptlookup"}):
        with pytest.raises(UserError):
            Engine(tiny(), None, EngineConfig(**bad))  # type: ignore[arg-type]


def test_layout_and_child() -> None:
    tree = Tree(np.array([7, 8, 9, 7]), np.array([-1, 0, -1, 1]))
    assert layout(tree).depth_X.tolist() == [0, 1, 2, 1, 3]
    assert layout(tree).sees_XX.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 1, 1, 0, 1],
    ]
    assert [child(tree, 0, 7), child(tree, 0, 9), child(tree, 1, 8), child(tree, 2, 7)] == [1, 3, 2, 4]
    assert [child(tree, 0, 8), child(tree, 3, 7), child(tree, 4, 7)] == [0, 0, 0]


def test_payoff_takes_the_cheaper_way_and_looks_again() -> None:
    payoff = Payoff()

    def steps(n: int, seconds: float, gain: int, sequences: int = 1) -> int:
        drafted = 0
        for _ in range(n):
            wants = payoff.wants(sequences)
            drafted += wants
            payoff.note(sequences, wants, seconds if wants else 1.0, gain * sequences if wants else sequences)
        return drafted

    assert steps(200, seconds=3.0, gain=2) < 30  # costs three steps, brings two tokens
    assert steps(400, seconds=3.0, gain=4) > 250  # the text changed
    assert steps(400, seconds=3.0, gain=2) < 150
    assert steps(200, seconds=1.1, gain=2, sequences=9) > 150  # other sizes are judged apart


def test_steps_without_drafts_when_they_do_not_pay() -> None:
    model, params = tiny(), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    want = Engine(model, None, EngineConfig(cache="2ktok")).generate(PROMPTS[:1], params)
    engine = Engine(model, None, EngineConfig(cache="2ktok", drafter="prompt-lookup"))
    assert engine.drafting is not None
    engine.drafting.drafter = Fixed(Tree(np.arange(90), np.arange(-1, 89)))  # dear and never right
    assert tokens(engine.generate(PROMPTS[:1], params)) == tokens(want)
    assert 0 < engine.counters["drafted_tokens"] < 40 * 90


def test_sixteen_bits_and_figures() -> None:
    """In bfloat16 the machinery is the same, roundings apart; what was drafted is to be read at /metrics."""
    from modicum.serve.metrics import Metrics
    from modicum.serve.worker import Worker

    model = tiny().bfloat16()
    engine = with_drafter(model, None, Fixed(Tree(np.arange(40), np.full(40, -1))), block_size=8, cache="2ktok")
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    assert all(len(o.tokens) == 20 for o in engine.generate(PROMPTS, params))
    assert_clean(engine)
    worker = Worker(engine)
    text = Metrics(worker).text().decode()
    worker.close()
    figures = dict(line.split() for line in text.splitlines() if line.startswith("modicum_") and "{" not in line)
    assert float(figures["modicum_drafted_tokens_total"]) == engine.counters["drafted_tokens"] > 0
    assert float(figures["modicum_accepted_tokens_total"]) == engine.counters["accepted_tokens"]
    assert float(figures["modicum_tokens_per_forward"]) >= 1
