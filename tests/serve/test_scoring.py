"""Scored continuations against the decoder's own forward pass, in whatever way the engine computes them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serve_tools import assert_clean, tiny

from modicum.core.errors import ModicumError
from modicum.model.decoder import Decoder
from modicum.serve import scoring
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import InvalidRequest, Output, Request, SamplingParams, collect

ASKS = SamplingParams(temperature=0, logprobs=1)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small blocks": {"block_size": 2},
    "no prefix cache": {"prefix_cache": False},
    "chunked": {"chunked_prefill": True, "max_batch_tokens": 16},
    "crowded": {"cache": "56tok", "chunked_prefill": True, "max_batch_tokens": 24},
    "sarathi": {"scheduler": "sarathi", "max_batch_tokens": 16},
    "learning drafter": {"drafter": "token-recycling", "draft_when": "always"},
}


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny()


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[int], tuple[list[int], ...]]]:
    rng = random.Random(3)

    def some(n: int) -> list[int]:
        return [rng.randrange(1, 400) for _ in range(n)]

    asks = [(some(n), (some(1), some(6), some(17))) for n in (1, 7, 16, 20, 33)]
    return [*asks, (asks[4][0], (asks[4][1][2], some(2), asks[4][1][2]))]  # the same again: found in the cache


def naive(model: Decoder, prompt: list[int], continuation: list[int]) -> list[tuple[float, int, float]]:
    """(log-probability, most likely token, its log-probability) at each place of the continuation."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + continuation]))[0, len(prompt) - 1 : -1]
    log_p_TV = torch.log_softmax(logits_TV.double(), -1)
    best, token = log_p_TV.max(-1)
    chosen = log_p_TV[range(len(continuation)), continuation]
    return list(zip(chosen.tolist(), token.tolist(), best.tolist(), strict=True))


def assert_scores(model: Decoder, asked: Any, outputs: list[Output]) -> None:
    for (prompt, continuations), output in zip(asked, outputs, strict=True):
        for continuation, completion in zip(continuations, output.completions, strict=True):
            assert completion.tokens == continuation and completion.finish == "length"
            for (want, token, top), got in zip(naive(model, prompt, continuation), completion.logprobs, strict=True):
                assert got.logprob == pytest.approx(want, abs=1e-4)
                assert got.top[0][0] == token and got.top[0][1] == pytest.approx(top, abs=1e-4)


def ask(engine: Engine, asked: Any, ahead: int | None = None, token_by_token: bool = False) -> list[Output]:
    requests = [Request(p, ASKS, c, token_by_token) for p, c in asked]
    outputs = {output.request: output for output in engine.outputs(requests, ahead)}
    return [outputs[r.id] for r in requests]


@pytest.mark.parametrize("native", [True, False], ids=["native", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_scores_are_the_decoders(model: Decoder, asked: Any, mode: str, native: bool, monkeypatch: Any) -> None:
    if not native:
        monkeypatch.setenv("MODICUM_NATIVE", "0")
    monkeypatch.setattr(scoring, "ROWS", 5)  # several slices a step
    engine = Engine(model, None, EngineConfig(**({"block_size": 8, "cache": "1ktok"} | MODES[mode])))
    assert_scores(model, asked, ask(engine, asked, ahead=1 if mode == "plain" else 3))
    assert_clean(engine)
    if mode == "plain":  # a prompt's whole blocks are computed once, and those of the last prompt not at all
        found = [(len(p) - 1) // 8 * 8 * (len(c) - 1) for p, c in asked]
        found[-1] += 32
        tokens = sum(len(p) + len(c) - 1 for p, some in asked for c in some)
        assert engine.counters["computed_tokens"] == tokens - sum(found)


def test_preempted_in_the_middle(model: Decoder, asked: Any) -> None:
    """What was scored before is neither lost nor read twice."""
    config = EngineConfig(block_size=8, cache="1ktok", chunked_prefill=True, max_batch_tokens=16, prefix_cache=False)
    engine = Engine(model, None, config)
    prompt, continuation = asked[1][0], asked[1][1][2]
    request = Request(prompt, ASKS, (continuation,))
    engine.add(request)
    engine.step()
    (sample,) = engine.samples.values()
    assert 0 < len(sample.scores) < len(continuation)
    engine.preempt(sample)
    updates = [u for _ in range(3) for u in engine.step()]
    assert_scores(model, [(prompt, (continuation,))], [collect([request], {request.id: updates})[0]])
    assert_clean(engine)


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_token_by_token(model: Decoder, asked: Any, drafter: str) -> None:
    engine = Engine(model, None, EngineConfig(block_size=8, cache="1ktok", drafter=drafter, draft_when="always"))
    assert_scores(model, asked, ask(engine, asked, token_by_token=True))
    assert_clean(engine)


def test_a_policy_that_drops_scores_what_it_would_generate(model: Decoder) -> None:
    """Greedy text under a thinned cache, scored under the same policy, is greedy at every place; and not so without."""
    config = {"block_size": 4, "cache": "1ktok", "prefix_cache": False}
    policy = {"kv": "snapkv:budget=0.3"}
    rng = random.Random(0)
    prompt = [rng.randrange(1, 400) for _ in range(40)]
    thinned = Engine(model, None, EngineConfig(**config, **policy))
    said = thinned.generate([prompt], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0].tokens
    scored = ask(Engine(model, None, EngineConfig(**config, **policy)), [(prompt, (said,))])[0].completions[0]
    assert [t.top[0][0] for t in scored.logprobs] == said
    whole = ask(Engine(model, None, EngineConfig(**config)), [(prompt, (said,))])[0].completions[0]
    assert [t.top[0][0] for t in whole.logprobs] != said


def test_beside_generation(model: Decoder, asked: Any) -> None:
    """Requests of both kinds in the same steps, answered as each would be alone."""
    engine = Engine(model, None, EngineConfig(block_size=8, cache="1ktok"))
    greedy = SamplingParams(temperature=0, max_tokens=12)
    alone = [o.tokens for o in engine.generate([p for p, _ in asked], greedy)]
    engine = Engine(model, None, EngineConfig(block_size=8, cache="1ktok"))
    requests = [r for p, c in asked for r in (Request(p, ASKS, c), Request(p, greedy))]
    outputs = {o.request: o for o in engine.outputs(requests, ahead=7)}
    assert_scores(model, asked, [outputs[r.id] for r in requests[::2]])
    assert [outputs[r.id].tokens for r in requests[1::2]] == alone


def test_refused(model: Decoder) -> None:
    engine = Engine(model, None, EngineConfig(block_size=8, cache="64tok"))
    for prompt, given, match in (
        ([1, 2], ([],), "empty"),
        ([], ([1],), "empty"),
        ([1], ([400],), "outside 0 to 399"),
        ([1] * 60, ([1] * 6,), "may have 65"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            engine.add(Request(prompt, ASKS, given))
    (output,) = ask(engine, [([1] * 60, ([1] * 5,))])  # the last token is not computed
    assert len(output.completions[0].logprobs) == 5


def test_not_a_number_ends_the_request(model: Decoder, monkeypatch: Any) -> None:
    engine = Engine(model, None, EngineConfig(block_size=8, cache="64tok"))
    monkeypatch.setattr(engine.runner, "logits", lambda rows: torch.full((len(rows), 400), float("nan")))
    with pytest.raises(ModicumError, match="not a number"):
        ask(engine, [([1, 2, 3], ([4, 5], [6]))])
    assert_clean(engine)


def test_leaving_early_aborts(model: Decoder, asked: Any) -> None:
    engine = Engine(model, None, EngineConfig(block_size=8, cache="1ktok"))
    taken = []

    def requests() -> Iterator[Request]:
        for prompt, continuations in asked:
            taken.append(prompt)
            yield Request(prompt, ASKS, continuations)

    outputs = engine.outputs(requests(), ahead=2)
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    assert len(taken) < len(asked)
    assert_clean(engine)
