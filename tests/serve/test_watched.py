"""What KV policies look at, by the kernels: queries and attention weights, of any piece of a prompt, also of sequences
with evicted entries. The decoder as it is written, and the extra product for weights, are the truth."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from serve_tools import assert_clean
from test_native import ISAS, decoder, needs_kernels
from torch import Tensor

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model.decoder import Decoder
from modicum.serve.backends import Runner
from modicum.serve.backends.native import Native
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv import Entries, Keep, KVPolicy
from modicum.serve.request import Output, Request, SamplingParams, Update, collect

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]
GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=1, ignore_eos=True)
PROMPTS = [list(range(i, i + n)) for i, n in ((3, 70), (40, 90), (7, 5), (20, 61))]
MODES: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks": {"chunked_prefill": True, "max_batch_tokens": 16},
    "preempted": {},
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set of the kernels that this processor has."""
    monkeypatch.setenv("MODICUM_ISA", request.param)


def engine(model: Decoder, backend: str, kv: Choice | str = "full", **config: Any) -> Engine:
    """One whose steps are all of one backend's, or fail."""
    given: dict[str, Any] = {"block_size": 8, "cache": "2ktok", "prefix_cache": False} | config
    e = Engine(model, None, EngineConfig(kv=kv, **given))
    kernels, as_written = e.runner.backends  # type: ignore[attr-defined]
    assert isinstance(kernels, Native)
    e.runner = Runner(kernels if backend == "native" else as_written)
    return e


class Noted(KVPolicy):
    """Notes all it is shown, by layer and first place, and keeps every third entry of a context once it is over."""

    observes, marks = True, "sum"
    skipped = 0  # of each step's places, first ones that are not marked

    def begin(self, prompt: int) -> KVPolicy:
        policy = type(self)(self.config, self.shape)
        policy.prompt, policy.skipped = prompt, self.skipped
        policy.tokens, policy.mass = {}, {}
        return policy

    def allow(self, layer: int, n_tokens: int) -> int:
        return n_tokens if n_tokens < self.prompt else -(-self.prompt // 3) + n_tokens - self.prompt

    def marked(self, start: int, n: int) -> range:
        return range(start + min(self.skipped, n - 1), start + n)

    def observe(self, layer: int, start: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor) -> None:
        self.tokens[layer, start] = torch.cat([q_HTE, k_GTE, v_GTE]).float()

    def mark(self, layer: int, mass_GS: Tensor) -> None:
        self.mass[layer, len(self.mass)] = mass_GS.clone()

    def keep(self, layer: int, entries: Entries) -> Keep:
        index = torch.arange(0, self.prompt, 3)
        rest = torch.arange(self.prompt, entries.counts[0])
        return Keep([torch.cat([index, rest])] * self.shape.kv_heads)


class Late(Noted):
    """Looks at the positions from 30 on."""

    def observed(self, start: int, n: int) -> range:
        return range(max(start, 30), start + n)

    marked = observed


class Largest(Noted):
    marks = "max"
    skipped = 2


def noted(e: Engine, policy: type[Noted], prompts: list[list[int]], context: int | None = None) -> list[Noted]:
    """What a policy was shown of each prompt and some tokens after it."""
    e.policy = e.cache.policy = policy(None, e.policy.shape)
    requests = [Request(p, GREEDY, compress_at=min(context, len(p)) if context else None) for p in prompts]
    for request in requests:
        e.add(request)
    policies = [r.sequences[0].policy for r in requests]
    while e.busy:
        assert not any(update.error for update in e.step())
    assert_clean(e)
    return policies


@pytest.mark.parametrize("policy", [Noted, Largest])
@pytest.mark.parametrize("name", ["plain", "windows and caps", "norms of all heads", "no gate, odd sizes"])
@pytest.mark.parametrize("mode", ["together", "chunks"])
def test_queries_and_weights_are_those_of_the_decoder(policy: type[Noted], name: str, mode: str) -> None:
    """Whole prompts and pieces, contexts that are compressed before a question: pieces of thinned sequences."""
    found = [noted(engine(decoder(name), b, **MODES[mode]), policy, PROMPTS, 33) for b in ("native", "torch")]
    for mine, truth in zip(*found, strict=True):
        for got, want in ((mine.tokens, truth.tokens), (mine.mass, truth.mass)):
            assert list(got) == list(want) and len(got) > 8
            for key in want:
                assert got[key].shape == want[key].shape
                assert torch.allclose(got[key], want[key], atol=3e-4, rtol=1e-3), key
    if policy is Noted:
        sums = {float(m.sum()) for m in found[0][1].mass.values()}
        assert max(sums) > 30, "rows of a piece are summed, not averaged"
    assert all(float(m.max()) <= 1.0001 for one in found[0] for m in one.mass.values()) or policy is Noted


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_is_looked_at_are_the_positions_that_were_named(backend: str) -> None:
    model = decoder()
    everything, late = (noted(engine(model, backend), policy, PROMPTS)[1] for policy in (Noted, Late))
    for layer in range(2):
        assert torch.equal(late.tokens[layer, 30], everything.tokens[layer, 0][:, 30:])
        got, whole = (one.mass[layer, layer] for one in (late, everything))
        assert torch.allclose(got.sum(1), torch.tensor(60.0)) and torch.allclose(whole.sum(1), torch.tensor(90.0))
        assert torch.allclose(got[:, 89], whole[:, 89]), "the last one is seen by itself alone"
    with pytest.raises(KeyError):
        late.tokens[0, 0]


def test_weights_in_bfloat16_are_those_of_the_softmax() -> None:
    """The weights that multiply values are rounded, what is handed out is not: a row sums to 1."""
    model = decoder().bfloat16()
    for one in noted(engine(model, "native"), Noted, PROMPTS):
        for (layer, _), mass_GS in one.mass.items():
            rows = mass_GS.sum(1)
            assert torch.allclose(rows, rows.round(), atol=1e-4), layer


@pytest.mark.parametrize("policy", [Noted, Largest])
def test_weights_depend_on_neither_company_nor_pieces_nor_threads(policy: type[Noted]) -> None:
    """Not a bit of them: sums go row by row. Pieces of one prompt, added up, are those of the whole."""

    def total(one: Noted, layer: int) -> Tensor:
        masses = [m for (i, _), m in one.mass.items() if i == layer]
        whole = masses[0].new_zeros(masses[0].shape[0], 90)
        if policy is Largest:
            return masses[0]
        for m in masses[: len([m for m in masses if m.shape[1] <= 90])]:
            whole[:, : m.shape[1]] += m
        return whole

    model = decoder()
    alone = noted(engine(model, "native"), policy, PROMPTS[1:2])[0]
    crowd = noted(engine(model, "native"), policy, PROMPTS)[1]
    assert torch.equal(total(crowd, 1), total(alone, 1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        wide = noted(engine(model, "native"), policy, PROMPTS)[1]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(total(wide, 1), total(alone, 1))
    if policy is Noted:
        pieces = noted(engine(model, "native", **MODES["chunks"]), policy, PROMPTS[1:2])[0]
        assert torch.allclose(total(pieces, 1), total(alone, 1), atol=1e-5)


def outputs(e: Engine, mode: str = "") -> list[Output]:
    """Prompts with contexts of half their length, twice, so that a prefix cache has something to find."""
    results = []
    for _ in range(2):
        requests = [Request(p, GREEDY, compress_at=-(-len(p) // 2)) for p in PROMPTS]
        updates: dict[int, list[Update]] = {r.id: [] for r in requests}
        for request in requests:
            e.add(request)
        for step in itertools.count():
            if mode == "preempted" and step == 9:
                e.preempt(e.samples[e.scheduler.running[-1].id])
            for update in e.step():
                updates[update.request].append(update)
            if not e.busy:
                break
        results += collect(requests, updates)
    assert_clean(e)
    return results


def assert_same(found: list[Output], truth: list[Output]) -> None:
    for a, b in zip(found, truth, strict=True):
        assert a.tokens and a.tokens == b.tokens
        for x, y in zip(a.completions[0].logprobs, b.completions[0].logprobs, strict=True):
            assert abs(x.logprob - y.logprob) < 2e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", registry.methods("kv"))
def test_every_policy_says_the_same_by_the_kernels(key: str, mode: str) -> None:
    loaded = registry.load("kv", key)
    toy = getattr(loaded.module, "TOY", None)
    kv = Choice("kv", key, vars(toy) if toy is not None else {})
    if loaded.cls.attends:
        pytest.skip("attends in its own way")
    config = MODES[mode] | {"prefix_cache": "prefix_cache" not in loaded.cls.conflicts}
    if "chunked_prefill" in config and "chunked_prefill" in loaded.cls.conflicts:
        pytest.skip("needs whole prompts")
    model = decoder()
    mine, truth = (engine(model, backend, kv, **config) for backend in ("native", "torch"))
    assert_same(outputs(mine, mode), outputs(truth, mode))
    assert mine.stats()["thinnings"] == truth.stats()["thinnings"] > 0 or not loaded.cls.drops
    assert mine.stats()["preemptions"] == (2 if mode == "preempted" else 0)


@pytest.mark.parametrize("kv", ["h2o:budget=8", "knorm:budget=12"])
def test_layers_with_windows_and_caps_thin_by_the_kernels(kv: str) -> None:
    model = decoder("windows and caps")
    mine, truth = (engine(model, backend, kv) for backend in ("native", "torch"))
    assert_same(mine.generate(PROMPTS, GREEDY), truth.generate(PROMPTS, GREEDY))
    assert mine.stats()["thinnings"] > 0
