"""Sampling against transformers' processors and float64 arithmetic; text against what was said."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_tools import engine, tokenizer

from modicum.data.tokenizer import Tokenizer
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve import sampling
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams
from modicum.serve.text import TextStream

VOCAB = 3000


def _logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


FILTERS: list[dict[str, Any]] = [
    {"top_k": 7},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 2000, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
    {"temperature": 1.8, "top_p": 0.95},
    {},
    {"top_k": 1},
    {"temperature": 0.2, "min_p": 0.3},
]


@pytest.mark.parametrize("scale", [3.0, 0.3])  # 0.3: nuclei larger than the candidates that are sorted first
def test_filters_keep_what_transformers_keeps(scale: float) -> None:
    """All filters in one batch, each row as transformers' processors in their order leave it."""
    from transformers.generation import logits_process as hf

    params = [SamplingParams(**f) for f in FILTERS]
    logits = _logits(len(params), scale=scale)
    got = sampling.filtered(logits, params)
    for i, p in enumerate(params):
        row = logits[i : i + 1].double() / p.temperature
        for processor in (
            ([hf.TopKLogitsWarper(p.top_k)] if p.top_k else [])
            + ([hf.TopPLogitsWarper(p.top_p)] if p.top_p < 1 else [])
            + ([hf.MinPLogitsWarper(p.min_p)] if p.min_p else [])
        ):
            row = processor(None, row)
        assert torch.equal(torch.isfinite(got[i]), torch.isfinite(row[0])), FILTERS[i]
        assert torch.allclose(got[i].softmax(-1).double(), row[0].softmax(-1), atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20000 draws over 8 tokens, at the uniform numbers of a seeded generator."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, -0.5]])
    p = SamplingParams(temperature=1.3)
    rng = random.Random(1)
    n = 20_000
    drawn = sampling.draw(logits.expand(n, -1), [p] * n, [rng.random() for _ in range(n)])
    want = (logits[0].double() / 1.3).softmax(-1) * n
    counts = torch.bincount(drawn, minlength=8).double()
    assert float(((counts - want) ** 2 / want).sum()) < 24.3  # 99.9% quantile at 7 degrees of freedom


def test_extreme_draws_take_possible_tokens() -> None:
    logits = torch.full((2, VOCAB), -50.0)
    logits[:, [10, 2990]] = 1.0
    params = [SamplingParams(top_k=2)] * 2
    assert sampling.draw(logits, params, [0.0, math.nextafter(1.0, 0.0)]).tolist() == [10, 2990]


def test_seed_decides_whatever_the_batch_is() -> None:
    params = SamplingParams(seed=11, temperature=1.2, top_p=0.9, max_tokens=15, ignore_eos=True)
    alone = engine().generate(["The"], params)[0]
    others = [
        SamplingParams(temperature=0),
        SamplingParams(seed=1, top_k=3),
        params,
        SamplingParams(seed=2, presence_penalty=1.0, logprobs=1),
    ]
    crowd = engine(chunked_prefill=True, max_batch_tokens=8).generate(["x", "def", "The", "emoji"], others)
    assert crowd[2].tokens == alone.tokens
    other = engine().generate(["The"], SamplingParams(seed=12, temperature=1.2, max_tokens=15, ignore_eos=True))[0]
    assert other.tokens != alone.tokens


def test_penalties_are_the_published_formulas() -> None:
    """Against a plain loop over tokens, for every combination in one batch."""
    shape = llama_like(400, 32, 2, heads=4, kv_heads=2, context_length=256)
    model = Decoder(shape, torch.Generator().manual_seed(0))  # fresh: it repeats itself
    e = Engine(model, None, EngineConfig(cache="2ktok"))
    prompt = [1, 2, 3, 1]
    knobs: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.2},
        {"frequency_penalty": 0.05},
        {
            "repetition_penalty": 0.8,
            "presence_penalty": 1.0,
            "frequency_penalty": 0.5,
            "logit_bias": {5: 0.5},
        },
    ]
    params = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, **k) for k in knobs]
    outputs = e.generate([prompt] * len(params), params)
    for p, out in zip(params, outputs, strict=True):
        said: list[int] = []
        for token in out.tokens:
            with torch.no_grad():
                logits = e.model(torch.tensor([prompt + said]))[0, -1].double()
            for t in {*prompt, *said}:
                factor = p.repetition_penalty
                logits[t] = logits[t] / factor if logits[t] > 0 else logits[t] * factor
            for t, count in Counter(said).items():
                logits[t] -= p.presence_penalty + p.frequency_penalty * count
            for t, bias in p.logit_bias.items():
                logits[t] += bias
            assert int(logits.argmax()) == token
            said.append(token)
    assert len({tuple(o.tokens) for o in outputs}) == len(knobs)


def test_logprobs_are_the_models() -> None:
    e = engine()
    params = SamplingParams(temperature=0.7, top_k=5, seed=0, max_tokens=8, logprobs=3, ignore_eos=True)
    done = e.generate([[9, 8, 7]], params)[0].completions[0]
    assert len(done.logprobs) == 8
    said: list[int] = []
    for entry in done.logprobs:
        with torch.no_grad():
            want = e.model(torch.tensor([[9, 8, 7, *said]]))[0, -1].double().log_softmax(-1)
        assert entry.logprob == pytest.approx(float(want[entry.token]), abs=1e-4)
        best = want.topk(3)
        assert [t for t, _ in entry.top] == best.indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        said.append(entry.token)
    assert said == done.tokens


# text -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=40), st.integers(0, 8))
def test_any_tokens_come_out_whole(ids: list[int], context: int) -> None:
    """Whatever the tokens, the pieces join to the decoded whole, and no piece is taken back."""
    tok = tokenizer_once()
    before = tok.encode("some context here")[:context]
    stream = TextStream(tok, (), before)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tok.decode(before + ids)[len(tok.decode(before)) :]
    for piece in pieces:
        piece.encode("utf-8")


@functools.cache
def tokenizer_once() -> Tokenizer:
    return tokenizer()


def test_characters_of_many_bytes_come_at_once() -> None:
    """Each byte a token: a character shows when it is whole, and never in part."""
    text = "naïve 日本 👩‍👩‍👧 🚀."
    stream = TextStream(Bytes())
    pieces = [stream.push(b) for b in text.encode()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces)
    assert stream.finish() == ""


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_bytes_that_never_become_a_character_are_shown_in_the_end() -> None:
    stream = TextStream(Bytes())
    assert "".join(stream.push(b) for b in b"a\xf0\x9f") == "a"
    assert stream.finish() == "\ufffd"
    bad = TextStream(Bytes())
    shown = "".join(bad.push(0xFF) for _ in range(50))
    assert len(shown) >= 47 and shown + bad.finish() == "\ufffd" * 50


@settings(max_examples=150, deadline=None)
@given(
    st.text("abc日", max_size=60),
    st.lists(st.text("abc日", min_size=1, max_size=4), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_stop_strings_across_pieces(text: str, stops: list[str], rng: random.Random) -> None:
    """The text ends before the first stop string, and nothing after its start was ever shown."""
    stream = TextStream(Bytes(), stops)
    shown = ""
    for byte in text.encode():
        shown += stream.push(byte)
        if stream.stopped is not None:
            break
    shown += stream.finish()
    found = [text.find(s) for s in stops if s in text]
    assert (stream.stopped is not None) == bool(found)
    # Pieces end at characters, so the stop that completes first wins; it cuts at its own start.
    if found:
        ends = [min(text.find(s) + len(s) for s in stops if s in text)]
        first = min(text.find(s) for s in stops if s in text and text.find(s) + len(s) <= ends[0])
        assert shown == text[:first]
    else:
        assert shown == text


def test_stop_string_held_back_while_possible() -> None:
    stream = TextStream(Bytes(), ["STOP"])
    assert [stream.push(b) for b in b"xSTy"] == ["x", "", "", "STy"]
