"""Reference test of cacheform/int8: codes one by one in float64, and engines that work from them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from serve_tools import tiny

from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.serve import native
from modicum.serve.backends import Runner
from modicum.serve.backends.native import Native
from modicum.serve.cacheforms.int8 import Config, Int8
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [torch.randint(1, 400, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 40, 63)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_error(dtype: torch.dtype) -> None:
    """Each entry by itself: rounded to nearest of 127 steps of its own largest number."""
    rng = torch.Generator().manual_seed(0)
    x_PE = (torch.randn(40, 16, generator=rng) * torch.logspace(-4, 3, 40)[:, None]).to(dtype)
    x_PE[7] = 0
    form = Int8(Config(), 16, dtype)
    codes_PE, scale_P1 = form.encode("k", x_PE)
    back_PE = form.decode("k", (codes_PE, scale_P1))
    assert codes_PE.dtype == torch.int8 and scale_P1.dtype == torch.bfloat16 and back_PE.dtype == dtype
    for p in range(40):
        largest = max(abs(float(x)) for x in x_PE[p].double())
        scale = float(torch.tensor(largest / 127).bfloat16())
        assert float(scale_P1[p]) == scale
        for e in range(16):
            x = float(x_PE[p, e].double())
            code = 0 if scale == 0 else max(-127, min(127, round(x / scale)))
            assert abs(int(codes_PE[p, e]) - code) <= (abs(x / scale % 1 - 0.5) < 1e-5 if scale else 0)
            # half a step; a scale that was rounded down cuts the largest ones by 127 / 256 of a step at most
            bound = scale / 2 * (1 + 1e-5) + abs(x) * (2.0**-8 if dtype == torch.bfloat16 else 1e-6)
            assert abs(float(back_PE[p, e].double()) - x) <= bound
    assert not back_PE[7].any()


def test_a_cache_of_the_same_size_holds_nearly_twice_as_many_tokens() -> None:
    shape = llama_like(400, 128, 2, heads=2, kv_heads=2, context_length=256)
    model = Decoder(shape, torch.Generator().manual_seed(0)).to(torch.bfloat16)
    plain, coded = (
        Engine(model, None, EngineConfig(cache="64KiB", max_sequences=4, cache_form=form)) for form in ("plain", "int8")
    )
    assert coded.storage.block_bytes * 64 * 2 == plain.storage.block_bytes * (64 + 2)
    assert coded.blocks.n_blocks == int(64 * 1024 // coded.storage.block_bytes) > 1.9 * plain.blocks.n_blocks - 2
    for engine in (plain, coded):
        engine.add(Request(PROMPTS[1], GREEDY))
        engine.step()
    assert coded.stats()["held_bytes"] * 128 == plain.stats()["held_bytes"] * 66
    assert sum(part.nbytes for x in (coded.storage.k, coded.storage.v) for part in x.codes) <= 64 * 1024


@pytest.mark.skipif(native.library() is None, reason=native.reason())
@pytest.mark.parametrize("kv", ["full", "snapkv:budget=20,window=4,kernel=3", "razorattention:budget=0.5,probe=8"])
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_kernels_read_and_write_the_same_codes(kv: str, head_dim: int) -> None:
    """Also prompts in chunks, drafts, entries of pages and merged ones."""
    shape = llama_like(400, 32, 2, heads=4, kv_heads=2, head_dim=head_dim, context_length=256)
    model = Decoder(shape, torch.Generator().manual_seed(1))
    said, stored = [], []
    for kernels in (True, False):
        config = EngineConfig(
            block_size=8, cache="2ktok", kv=kv, cache_form="int8", chunked_prefill=True, max_batch_tokens=32,
            drafter="prompt-lookup" if kv == "full" else "none", draft_when="always",
        )  # fmt: skip
        engine = Engine(model, None, config)
        assert isinstance(engine.runner.backends[0], Native)
        if not kernels:
            engine.runner = Runner(engine.runner.backends[-1])
        params = dataclasses.replace(GREEDY, logprobs=1)
        outputs = engine.generate([p * 2 for p in PROMPTS], params)
        if kernels and kv == "full":
            assert not engine.stats()["fallbacks"]
        said.append([t.logprob for o in outputs for t in o.completions[0].logprobs])
        stored.append(engine.storage.k.codes[0].float())
    assert torch.allclose(torch.tensor(said[0]), torch.tensor(said[1]), atol=0.02)
    if kv == "full":
        first = (stored[0][0] - stored[1][0]).abs()  # of the first layer, whose inputs are the same
        assert bool(stored[0].any()) and float(first.max()) <= 1 and float((first > 0).float().mean()) < 0.01


def test_answers_stay_close_to_those_of_the_plain_cache() -> None:
    model = tiny()
    given = [tuple(PROMPTS[0]), tuple(PROMPTS[2][:20])]
    scores = {}
    for form in ("plain", "int8"):
        engine = Engine(model, None, EngineConfig(block_size=8, cache="1ktok", cache_form=form, prefix_cache=False))
        request = Request(PROMPTS[1], SamplingParams(temperature=0, logprobs=1), tuple(given), token_by_token=True)
        outputs = list(engine.outputs([request]))
        scores[form] = torch.tensor([t.logprob for c in outputs[0].completions for t in c.logprobs])
    error = (scores["int8"] - scores["plain"]).abs()
    assert 0 < float(error.max()) < 0.5 and float(error.mean()) < 0.1
