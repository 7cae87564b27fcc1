"""A context that is compressed before its question: what is kept, and what the question then sees."""

from __future__ import annotations

import pytest
import torch
from serve_tools import assert_clean, tiny
from torch import Tensor

from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import InvalidRequest, Request, SamplingParams

CONTEXT, KV = 30, "snapkv:budget=12,window=4,kernel=3"
PROMPT = torch.randint(1, 400, (41,), generator=torch.Generator().manual_seed(0)).tolist()
PARAMS = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
Kept = dict[tuple[int, int], list[int]]


def _kept(engine: Engine, request: Request) -> Kept:
    """Positions that the heads hold right after compression."""
    engine.add(request)
    engine.step()
    pages = engine.samples[request.sequences[0].id].pages
    assert pages is not None
    held = [engine.storage.entries_of_pages(layer, pages) for layer in range(2)]
    return {(i, g): e.position_GS[g, : e.counts[g]].tolist() for i, e in enumerate(held) for g in range(2)}


class Kept12:
    """An `attend` of a whole text in which tokens after the context see of it what was kept only."""

    def __init__(self, kept: Kept):
        self.kept = kept

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: object, scale: float, softcap: object
    ) -> Tensor:
        T, R = q.shape[2], q.shape[1] // k.shape[1]
        out = torch.empty_like(q)
        for g in range(k.shape[1]):
            seen = torch.ones(T, T, dtype=torch.bool).tril()
            seen[CONTEXT:, [s for s in range(CONTEXT) if s not in self.kept[layer, g]]] = False
            for h in range(g * R, (g + 1) * R):
                scores = (q[0, h].double() @ k[0, g].double().T * scale).masked_fill(~seen, float("-inf"))
                out[0, h] = (scores.softmax(-1) @ v[0, g].double()).float()
        return out


@pytest.mark.parametrize("more", [{}, {"chunked_prefill": True, "max_batch_tokens": 7}])
def test_the_question_sees_what_its_context_alone_keeps(more: dict[str, object]) -> None:
    model = tiny()
    given = {"block_size": 4, "cache": "400tok", "kv": KV} | more
    alone = Engine(model, None, EngineConfig(block_size=4, cache="400tok", kv=KV))
    want = _kept(alone, Request(PROMPT[:CONTEXT], PARAMS))
    assert want != _kept(alone, Request(PROMPT, PARAMS)), "the question changes nothing: the test would see nothing"
    engine = Engine(model, None, EngineConfig(**given))  # type: ignore[arg-type]
    requests = [Request(PROMPT, PARAMS, compress_at=CONTEXT), Request(PROMPT[::-1], PARAMS)]
    for request in requests:
        engine.add(request)
    sample = requests[0].sequences[0]
    while engine.busy:
        engine.step()
        if sample.job.computed == CONTEXT:
            assert sample.pages is not None and int(sample.pages.count_LG.max()) == 12
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(9):
            tokens.append(int(model(torch.tensor([tokens]), attend=Kept12(want))[0, -1].argmax()))
    assert sample.tokens == tokens
    assert requests[1].sequences[0].tokens == [*PROMPT[::-1], *alone.generate([PROMPT[::-1]], PARAMS)[0].tokens]
    assert engine.stats()["thinnings"] == 2 and engine.counters["failures"] == 0
    assert_clean(engine)


def test_a_preempted_one_is_compressed_there_again() -> None:
    engine = Engine(tiny(), None, EngineConfig(block_size=4, cache="400tok", kv=KV))
    request = Request(PROMPT, PARAMS, compress_at=CONTEXT)
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.preempt(request.sequences[0])
    while engine.busy:
        assert not any(update.error for update in engine.step())
    assert engine.stats()["thinnings"] == 2
    assert_clean(engine)


def test_a_place_outside_the_prompt_is_refused() -> None:
    engine = Engine(tiny(), None, EngineConfig(cache="400tok", kv=KV))
    for place in (0, 42):
        with pytest.raises(InvalidRequest, match=f"compress_at={place}"):
            engine.add(Request(PROMPT, PARAMS, compress_at=place))
