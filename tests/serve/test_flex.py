"""Chunks of prompts by FlexAttention, uncompiled here: the same outputs, and no mask of queries times keys."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from serve_tools import assert_clean
from test_native import decoder

from modicum.core.errors import UserError
from modicum.serve.backends import Runner, flex
from modicum.serve.backends.flex import Flex
from modicum.serve.backends.planned import PlannedAttend
from modicum.serve.backends.torch import Torch
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
PROMPTS = [list(range(90)), list(range(40)) + [7] * 33, [5, 6, 7], [*range(40), 8]]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODICUM_FLEX", "eager")
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")


def engine(name: str, **more: Any) -> Engine:
    return Engine(decoder(name), None, EngineConfig(block_size=8, cache="2ktok", **more))


@pytest.mark.parametrize("name", ["plain", "windows and caps"])
@pytest.mark.parametrize("more", [{}, {"chunked_prefill": True, "max_batch_tokens": 24}])
def test_chunks_attend_as_ever(name: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts, chunks and rests behind a prefix of the cache, beside sequences that decode."""
    e, truth = engine(name, **more), engine(name, **more)
    mine = e.runner.backends[0]  # type: ignore[attr-defined]
    assert isinstance(mine, Flex) and mine.name == "flex, eager"
    kernel, calls = flex._kernel(False), []

    def counted(q: Any, k: Any, *given: Any, **how: Any) -> Any:
        calls.append((q.shape[2], k.shape[2]))
        blocks, S = how["block_mask"].to_dense()[0, 0], k.shape[2]
        at = torch.arange(S - q.shape[2], S)
        reached = blocks.bool()[:, : -(-S // 128)].repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert bool(reached[: len(at), :S][torch.arange(S) == at[:, None]].all()), "a query sees at least itself"
        return kernel(q, k, *given, **how)

    monkeypatch.setattr(flex, "_kernel", lambda compiled: counted)
    e.runner = Runner(mine, Torch(e.model))
    truth.runner = Runner(Torch(truth.model))
    for _ in range(2):
        for a, b in zip(e.generate(PROMPTS, PARAMS), truth.generate(PROMPTS, PARAMS), strict=True):
            assert a.tokens == b.tokens
            for x, y in zip(a.completions[0].logprobs, b.completions[0].logprobs, strict=True):
                assert abs(x.logprob - y.logprob) < 2e-4
    assert calls and any(S > T for T, S in calls), "chunks behind cached tokens"
    assert any("no chunk" in reason for reason in e.runner.fallbacks), "decode steps are for others"
    assert_clean(e)


def test_no_mask_is_made_for_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine("windows and caps", chunked_prefill=True, max_batch_tokens=24)
    e.runner = Runner(e.runner.backends[0], Torch(e.model))  # type: ignore[attr-defined]
    masks = []
    reach = PlannedAttend._reach
    monkeypatch.setattr(PlannedAttend, "_reach", lambda *given: masks.append(r := reach(*given)) or r)
    e.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=1))
    assert masks and all(r.mask is None for r in masks)


def test_a_kernel_that_fails_leaves_the_step_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **how: Any) -> Any:
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(flex, "_kernel", lambda compiled: broken)
    e = engine("plain", chunked_prefill=True, max_batch_tokens=24)
    e.runner = Runner(e.runner.backends[0], Torch(e.model))  # type: ignore[attr-defined]
    want = engine("plain", chunked_prefill=True, max_batch_tokens=24)
    want.runner = Runner(Torch(want.model))
    assert e.generate(PROMPTS, PARAMS)[0].tokens == want.generate(PROMPTS, PARAMS)[0].tokens
    assert e.runner.fallbacks["flex, eager: FlexAttention failed (no Triton here)"] > 1


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODICUM_FLEX")
    assert not any(isinstance(b, Flex) for b in engine("plain").runner.backends)  # type: ignore[attr-defined]
    monkeypatch.setenv("MODICUM_FLEX", "yes")
    with pytest.raises(UserError, match="MODICUM_FLEX=yes"):
        engine("plain")
