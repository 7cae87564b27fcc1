"""Steps of many rows go where they are measured to be faster: what is measured, kept and chosen; equal results."""

import json

import pytest
import torch

from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.shorter import without
from modicum.serve import native
from modicum.serve.backends import measured
from modicum.serve.backends.measured import Timing, crossover
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no kernels on this machine")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def model():
    shape = llama_like(97, 64, 3, context_length=256)
    return Decoder(shape, torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize(
    ("library", "least"),
    [
        ((1.0, 1.0, 1.0), None),  # no faster than the kernels' 1.0
        ((0.95, 0.95, 0.95), None),  # too little faster
        ((0.5, 0.5, 0.5), 32),
        ((2.0, 0.5, 0.5), 128),
        ((2.0, 2.0, 0.5), 512),
        ((0.5, 2.0, 0.5), 512),  # from there on at every size
        ((0.5, 0.5, 2.0), None),
    ],
)
def test_crossover_is_the_fewest_rows_from_which_the_library_always_wins(library, least):
    timings = [Timing(r, 1.0, s) for r, s in zip((32, 128, 512), library, strict=True)]
    assert crossover(timings) == (None if least is None else ("torch", least))


@pytest.mark.parametrize(
    ("tiles", "library", "faster"),
    [
        ((0.3, 0.3, 0.3), (0.5, 0.5, 0.5), ("tiles", 32)),
        ((0.5, 0.5, 0.5), (0.3, 0.3, 0.3), ("torch", 32)),
        ((0.3, 0.3, 0.5), (1.0, 0.5, 0.3), ("torch", 32)),  # the library at the largest size, something else before
        ((1.0, 0.5, 0.3), (1.0, 1.0, 1.0), ("tiles", 128)),
        ((0.95, 0.95, 0.95), (1.0, 1.0, 1.0), None),
    ],
)
def test_tiles_of_the_kernels_are_another_way(tiles, library, faster):
    timings = [Timing(r, 1.0, s, t) for r, s, t in zip((32, 128, 512), library, tiles, strict=True)]
    assert crossover(timings) == faster


def test_a_shorter_decoder_has_the_same_modules(model):
    few = without(model, {2})
    assert few.config.layers == 2 and few.layers[1] is model.layers[1] and few.lm_head is model.lm_head
    ids = torch.arange(8)[None]
    assert len(model.layers) == 3 and torch.equal(few.layers[0](few.embed(ids), *_rest(few, ids)), _first(model, ids))


def _rest(decoder, ids):
    from modicum.model.attend import DenseAttend

    tables, index = decoder.ropes()
    return tables[index[0]](torch.arange(ids.shape[1])[None], torch.float32), DenseAttend(None, None)


def _first(decoder, ids):
    return decoder.layers[0](decoder.embed(ids), *_rest(decoder, ids))


@needs_kernels
def test_it_is_measured_once_for_each_kind_of_model(model, home, monkeypatch):
    calls = []
    monkeypatch.setattr(measured, "ROWS", (4, 16))
    real = measured.measure
    monkeypatch.setattr(measured, "measure", lambda *given: calls.append(1) or real(*given))
    first = measured.timings(model, EngineConfig(), Engine)
    assert [t.rows for t in first] == [4, 16] and all(t.native > 0 and t.torch > 0 for t in first)
    assert measured.timings(model, EngineConfig(), Engine) == first and len(calls) == 1
    other = Decoder(llama_like(97, 64, 2, context_length=256), torch.Generator().manual_seed(0)).eval()
    measured.timings(other, EngineConfig(), Engine)
    kept = json.loads((home / "backends.json").read_text())
    assert len(calls) == 2 and len(kept) == 2


@needs_kernels
def test_long_steps_take_tiles_where_those_are_fastest(model, monkeypatch):
    monkeypatch.setenv("MODICUM_ISA", native.EMULATED)
    if native.library() is None:
        pytest.skip(native.reason())
    half = model.to(torch.bfloat16)
    assert [t.tiles is not None for t in _timed(half, monkeypatch)] == [True, True]
    monkeypatch.setattr(measured, "timings", lambda *given: [Timing(40, 1.0, 0.9, 0.5), Timing(512, 1.0, 0.9, 0.5)])
    prompts = [[*range(1, 41)], [5, 6, 7]]
    logits = []
    for fast in (False, True):
        engine = Engine(half, None, EngineConfig(cache="512tok", fast_prefill=fast, prefix_cache=False))
        assert engine.runner.backends[0].name == "native" and type(engine.runner).__name__ == "Runner"
        inner, seen = engine.runner, []
        engine.runner = lambda plan, rows, inner=inner, seen=seen: seen.append(inner(plan, rows)) or seen[-1]
        engine.generate(prompts, GREEDY)
        logits.append(seen)
    assert not torch.equal(logits[0][0], logits[1][0])  # the prompts, 43 rows
    assert float((logits[0][0] - logits[1][0]).abs().max()) < 0.05


def _timed(model, monkeypatch):
    with monkeypatch.context() as only:
        only.setattr(measured, "ROWS", (4, 16))
        return measured.timings(model, EngineConfig(), Engine)


@needs_kernels
def test_long_steps_take_the_library_and_answers_are_the_same(model, monkeypatch):
    slow = [Timing(8, 1.0, 0.5), Timing(64, 1.0, 0.5)]
    monkeypatch.setattr(measured, "timings", lambda *given: slow)
    prompts = [list(range(1, 41)), [5, 6, 7]]
    plain = Engine(model, None, EngineConfig(cache="512tok"))
    fast = Engine(model, None, EngineConfig(cache="512tok", fast_prefill=True))
    taken = []
    for backend in fast.runner.backends:
        monkeypatch.setattr(type(backend), "__call__", _noting(type(backend).__call__, taken))
    want = [list(r.tokens) for r in plain.generate(prompts, GREEDY)]
    taken.clear()
    assert [list(r.tokens) for r in fast.generate(prompts, GREEDY)] == want
    assert taken[0] == ("eager", 43) and set(taken[1:]) == {("native", 2)}


def _noting(call, taken):
    def noted(self, plan, rows):
        taken.append((self.name, sum(work.n for work in plan.works)))
        return call(self, plan, rows)

    return noted


def test_without_kernels_there_is_nothing_to_choose(model, monkeypatch):
    monkeypatch.setenv("MODICUM_NATIVE", "0")
    engine = Engine(model, None, EngineConfig(cache="256tok", fast_prefill=True))
    assert [backend.name for backend in engine.runner.backends] == ["eager"]
    assert measured.timings(model, EngineConfig(), Engine) == []
