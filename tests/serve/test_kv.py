"""Thinned caches: a policy with head lengths of its own, against attention over plain lists."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from serve_tools import assert_clean, tiny
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.config import by_layer, llama_like
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig, longest
from modicum.serve.engine import Engine
from modicum.serve.kv import CacheShape, Entries, Keep, KVPolicy
from modicum.serve.request import Request, SamplingParams

BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    sinks: int = 2
    recent: int = 4
    stream: bool = False  # thin while the prompt is still being computed


class Ladder(KVPolicy):
    """Each head keeps the first entries and a number of the last that differs by head and layer."""

    config: Config
    observes = True

    def begin(self, prompt: int) -> KVPolicy:
        policy = Ladder(self.config, self.shape)
        policy.prompt, policy.seen = prompt, 0
        return policy

    def observe(self, layer: int, start: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor) -> None:
        assert q_HTE.shape[1] == k_GTE.shape[1] == v_GTE.shape[1]
        self.seen += q_HTE.shape[1] * (layer == 0)

    def length(self, layer: int, head: int) -> int:
        return self.config.sinks + self.config.recent + 3 * head + 2 * layer

    def allow(self, layer: int, n_tokens: int) -> int:
        if n_tokens < self.prompt and not self.config.stream:
            return n_tokens
        return self.length(layer, self.shape.kv_heads - 1)

    def keep(self, layer: int, entries: Entries) -> Keep:
        heads = []
        for head, count in enumerate(entries.counts):
            at = torch.arange(count)
            last = self.length(layer, head) - self.config.sinks
            heads.append(at[(at < self.config.sinks) | (at >= count - last)])
        return Keep(heads)


class Lists:
    """The same policy over one list of (key, value, position) per layer and head, in float64."""

    def __init__(self, model: Decoder, policy: KVPolicy, prompt: int):
        self.heads: list[list[list[tuple[Tensor, Tensor, int]]]] = [
            [[] for _ in range(model.config.kv_heads)] for _ in range(model.config.layers)
        ]
        self.policy, self.prompt, self.n = policy.begin(prompt), prompt, 0

    def __call__(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BGSE: Tensor,
        v_BGSE: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        _, H, T, _ = q_BHTE.shape
        G = k_BGSE.shape[1]
        out = torch.empty_like(q_BHTE)
        for t in range(T):
            for g in range(G):
                self.heads[layer][g].append((k_BGSE[0, g, t].double(), v_BGSE[0, g, t].double(), self.n + t))
            for h in range(H):
                seen = [e for e in self.heads[layer][h // (H // G)] if window is None or e[2] > self.n + t - window]
                scores = torch.stack([(q_BHTE[0, h, t].double() @ k) * scale for k, _, _ in seen])
                weights = scores.softmax(0)
                out[0, h, t] = sum(w * v for w, (_, v, _) in zip(weights, seen, strict=True)).float()
        return out

    def commit(self, n: int) -> None:
        """When the engine would ask the policy: at the prompt's end, then a block above what is allowed."""
        self.n += n
        ended = self.n - n < self.prompt <= self.n
        if not ended and self.n // BLOCK == (self.n - n) // BLOCK:
            return
        held = [max(len(h) for h in heads) for heads in self.heads]
        allowed = [self.policy.allow(i, self.n) for i in range(len(held))]
        if all(h <= a + (0 if ended else BLOCK) for h, a in zip(held, allowed, strict=True)):
            return
        for layer, heads in enumerate(self.heads):
            counts = [len(h) for h in heads]
            empty = torch.empty(0)
            kept = self.policy.keep(layer, Entries(empty, empty, empty, counts)).heads
            self.heads[layer] = [[h[i] for i in index.tolist()] for h, index in zip(heads, kept, strict=True)]


def _say(model: Decoder, policy: KVPolicy, prompt: list[int], n: int, piece: int | None = None) -> list[int]:
    lists, tokens = Lists(model, policy, len(prompt)), list(prompt)
    at = 0
    with torch.no_grad():
        while len(tokens) < len(prompt) + n:
            end = len(tokens) if piece is None else min(len(tokens), at + piece)
            h = model.hidden(torch.tensor([tokens[at:end]]), positions_BT=torch.arange(at, end)[None], attend=lists)
            lists.commit(end - at)
            at = end
            if at == len(tokens):
                tokens.append(int(model.head(h[0, -1]).argmax()))
    return tokens[len(prompt) :]


def _engine(model: Decoder, config: Config | None = None, **more: Any) -> Engine:
    e = Engine(model, None, EngineConfig(**{"block_size": BLOCK, "cache": "1ktok"} | more))
    shape = model.config
    e.policy = e.cache.policy = Ladder(
        config or Config(),
        CacheShape(
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            block_size=BLOCK,
            windows=tuple(layer.window for layer in shape.per_layer),
        ),
    )
    e.policy.prompt = 0
    e.max_length = longest(e.config, shape, e.policy, e.cache.capacity)
    return e


def _model(window: int | None) -> Decoder:
    if window is None:
        return tiny()
    shape = llama_like(400, 32, 2, heads=4, kv_heads=2, context_length=256, overrides=by_layer(window=(window, None)))
    model = Decoder(shape)
    model.load_state_dict(tiny().state_dict())
    return model


PROMPTS = [[random.Random(i).randrange(400) for _ in range(n)] for i, n in enumerate((3, 20, 37, 60))]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("mode", ["alone", "together", "chunked", "crowded"])
def test_thinned_outputs_are_those_of_plain_lists(window: int | None, mode: str) -> None:
    model = _model(window)
    more: dict[str, Any] = {
        "alone": {"max_sequences": 1},
        "together": {},
        "crowded": {"cache": "96tok"},
        "chunked": {"chunked_prefill": True, "max_batch_tokens": 16},
    }[mode]
    e = _engine(model, **more)
    want = [_say(model, e.policy, p, 16) for p in PROMPTS]
    full = Engine(model, None, EngineConfig(cache="1ktok")).generate(PROMPTS, GREEDY)
    assert [o.tokens for o in full] != want, "the policy changes nothing: the test would see nothing"
    for _ in range(2):  # the second time prompts come from the prefix cache: thinned ones stay out of it
        assert [o.tokens for o in e.generate(PROMPTS, GREEDY)] == want
    assert e.stats()["thinnings"] >= 2 * len(PROMPTS)
    assert (e.counters["cached_tokens"] > 0) == (mode != "crowded")
    assert_clean(e)


def test_thinning_during_the_prompt() -> None:
    model = tiny()
    e = _engine(model, Config(stream=True), chunked_prefill=True, max_batch_tokens=8, prefix_cache=False)
    want = [_say(model, e.policy, p, 16, piece=8) for p in PROMPTS]
    assert [e.generate([p], GREEDY)[0].tokens for p in PROMPTS] == want
    assert_clean(e)


def test_memory_is_freed_and_a_stream_outgrows_the_cache() -> None:
    """167 tokens through a cache of 64: what is held stays flat, and blocks are really given back."""
    model = tiny()
    e = _engine(model, cache="64tok", prefix_cache=False)
    used = []
    prompt = PROMPTS[2]
    tokens: list[int] = []
    for update in e.stream(prompt, SamplingParams(temperature=0, max_tokens=130, ignore_eos=True)):
        tokens += update.tokens
        used.append(e.stats()["used_blocks"])
    assert len(tokens) == 130 and tokens == _say(model, e.policy, prompt, 130)
    assert used[0] <= 6 and max(used[:-1]) <= 7  # 37 tokens took ten blocks before the prompt's end
    assert_clean(e)


def test_aborts_and_failures_give_pages_back() -> None:
    e = _engine(tiny())
    requests = [Request(p, GREEDY) for p in PROMPTS]
    for request in requests:
        e.add(request)
    for _ in range(6):
        e.step()
    assert e.pages.free > 0
    e.abort(requests[2].id)
    e.fail([requests[3].id], "test")
    e.blocks.check()
    while e.busy:
        e.step()
    assert_clean(e)


class Brittle(Ladder):
    """Fails for prompts of 20 tokens when it is shown queries, for those of 37 when it is asked what to keep."""

    def begin(self, prompt: int) -> KVPolicy:
        policy = Brittle(self.config, self.shape)
        policy.prompt, policy.seen = prompt, 0
        return policy

    def observe(self, layer: int, start: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor) -> None:
        if self.prompt == 20:
            raise KeyError("observed")

    def keep(self, layer: int, entries: Entries) -> Keep:
        if self.prompt == 37:
            raise ValueError("kept")
        return super().keep(layer, entries)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_policy_that_fails_ends_its_own_request_alone(chunked: bool) -> None:
    more: dict[str, Any] = {"chunked_prefill": True, "max_batch_tokens": 16} if chunked else {}
    e = _engine(tiny(), **more)
    want = [_say(e.model, e.policy, p, 16) for p in PROMPTS]
    e.policy = e.cache.policy = Brittle(Config(), e.policy.shape)
    e.policy.prompt = 0
    requests = [Request(p, GREEDY) for p in PROMPTS]
    for request in requests:
        e.add(request)
    errors: dict[int, str] = {}
    while e.busy:
        errors |= {update.request: update.error for update in e.step() if update.error}
    assert "observed" in errors.pop(requests[1].id) and "kept" in errors.pop(requests[2].id) and not errors
    assert e.counters["failures"] == 2
    for i in (0, 3):
        assert requests[i].sequences[0].tokens[len(PROMPTS[i]) :] == want[i]
    assert_clean(e)


class TwoKinds(KVPolicy):
    """Sequences that differ in all a policy may: some attend in their own way, each at its own temperature."""

    attends = True

    def begin(self, prompt: int) -> KVPolicy:
        policy = TwoKinds(self.config, self.shape)
        policy.exact = (0, 1 << 30, 0)[prompt % 3]
        policy.sharpness = (3.0, 1.0, 0.2)[prompt % 3]
        return policy

    def allow(self, layer: int, n_tokens: int) -> int:
        return min(n_tokens, 12)

    def keep(self, layer: int, entries: Entries) -> Keep:
        return Keep([torch.arange(max(0, n - 12), n) for n in entries.counts])

    def attend(
        self,
        layer: int,
        q_GBRTE: Tensor,
        k_GBSE: Tensor,
        v_GBSE: Tensor,
        at_BT: Tensor,
        position_GBS: Tensor,
        held_GBS: Tensor,
        *,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        seen_GB1TS = (held_GBS[:, :, None] & (position_GBS[:, :, None] <= at_BT[:, :, None]))[:, :, None]
        scores = q_GBRTE @ k_GBSE[:, :, None].transpose(-1, -2) * (scale * self.sharpness)
        return scores.masked_fill(~seen_GB1TS, float("-inf")).softmax(-1) @ v_GBSE[:, :, None]


def test_every_sequence_attends_by_its_own_policy() -> None:
    prompts = [[random.Random(i).randrange(400) for _ in range(n)] for i, n in enumerate((30, 31, 32, 33, 34, 35))]
    said = []
    for groups in ([prompts], [prompts[::-1]], [[p] for p in prompts]):
        e = _engine(tiny(), prefix_cache=False)
        e.policy = e.cache.policy = TwoKinds(None, e.policy.shape)
        answers = {len(p): o.tokens for ps in groups for p, o in zip(ps, e.generate(ps, GREEDY), strict=True)}
        said.append([answers[len(p)] for p in prompts])
        assert e.stats()["thinnings"] > 0 and e.counters["failures"] == 0
        assert_clean(e)
    assert said[0] == said[2] and said[1] == said[2]


def test_observers_see_every_token_once() -> None:
    e = _engine(tiny(), chunked_prefill=True, max_batch_tokens=8, prefix_cache=False)
    request = Request(PROMPTS[3], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    e.add(request)
    seen = []
    while e.busy:
        policy = request.sequences[0].policy
        e.step()
        seen.append(policy.seen)
    assert seen[-1] == len(PROMPTS[3]) + 4


def test_what_a_policy_does_not_support_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from modicum.serve.kv.full import Full

    monkeypatch.setattr(Full, "conflicts", frozenset({"prefix_cache", "sliding_window"}))
    with pytest.raises(UserError, match="kv 'full' cannot be combined with the prefix cache; set prefix_cache=false"):
        Engine(tiny(), None, EngineConfig(cache="1ktok"))
    with pytest.raises(UserError, match="window"):
        Engine(_model(9), None, EngineConfig(cache="1ktok", prefix_cache=False))
