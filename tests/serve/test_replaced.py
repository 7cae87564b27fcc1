"""Kept entries that a policy changes are stored instead of what they were, by each backend and form with pages."""

from __future__ import annotations

import pytest
import torch
from serve_tools import assert_clean, tiny
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.serve.backends import Runner
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv import Entries, Keep, KVPolicy
from modicum.serve.request import Request, SamplingParams

PROMPT = torch.randint(1, 400, (23,), generator=torch.Generator().manual_seed(0)).tolist()
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class Averaged(KVPolicy):
    """Of each two neighbours in a prompt the second stays, as the mean of both. Head 1 of layer 0 is left as it is."""

    prompt = 0
    wrong = False

    def begin(self, prompt: int) -> KVPolicy:
        policy = type(self)(self.config, self.shape)
        policy.prompt = prompt // 2 * 2
        return policy

    def allow(self, layer: int, n_tokens: int) -> int:
        return n_tokens if n_tokens < self.prompt else n_tokens - self.prompt // 2

    def keep(self, layer: int, entries: Entries) -> Keep:
        n = self.prompt
        index = torch.cat([torch.arange(1, n, 2), torch.arange(n, entries.counts[0])])
        replaced: list[tuple[Tensor, Tensor] | None] = []
        for g in range(self.shape.kv_heads):
            k_CE, v_CE = (
                torch.cat([(x[g, 0:n:2].float() + x[g, 1:n:2].float()) / 2, x[g, n : entries.counts[0]].float()])
                for x in (entries.k_GSE, entries.v_GSE)
            )
            replaced.append(None if (layer, g) == (0, 1) else (k_CE[: len(k_CE) - self.wrong], v_CE))
        return Keep([index] * self.shape.kv_heads, replaced=replaced)


class Wrong(Averaged):
    wrong = True


class Lists:
    """An `attend` over one list of (key, value) for each layer and KV head, in float64."""

    def __init__(self, model: Decoder):
        self.heads: list[list[list[tuple[Tensor, Tensor]]]] = [
            [[] for _ in range(model.config.kv_heads)] for _ in range(model.config.layers)
        ]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: object, scale: float, softcap: object
    ) -> Tensor:
        out, R = torch.empty_like(q), q.shape[1] // k.shape[1]
        for t in range(q.shape[2]):
            for g, entries in enumerate(self.heads[layer]):
                entries.append((k[0, g, t].double(), v[0, g, t].double()))
                for h in range(g * R, (g + 1) * R):
                    weights = torch.stack([q[0, h, t].double() @ e[0] * scale for e in entries]).softmax(0)
                    out[0, h, t] = sum(w * e[1] for w, e in zip(weights, entries, strict=True)).float()  # type: ignore[union-attr]
        return out

    def halve(self, n: int) -> None:
        for layer, heads in enumerate(self.heads):
            for g, entries in enumerate(heads):
                both = [(entries[i], entries[i + 1]) for i in range(0, n - 1, 2)]
                mean = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in both]
                heads[g] = ([b for _, b in both] if (layer, g) == (0, 1) else mean) + entries[n // 2 * 2 :]


@pytest.mark.parametrize("backend", [0, -1])
def test_a_mean_with_the_evicted_neighbour_is_that_of_a_loop(backend: int) -> None:
    model = tiny()
    engine = Engine(model, None, EngineConfig(block_size=4, cache="400tok"))
    engine.policy = engine.cache.policy = Averaged(None, engine.policy.shape)
    engine.runner = Runner(engine.runner.backends[backend])  # type: ignore[attr-defined]
    requests = [Request(p, PARAMS) for p in (PROMPT, PROMPT[:9])]
    for request in requests:
        engine.add(request)
    engine.step()
    sample, lists = requests[0].sequences[0], Lists(model)
    with torch.no_grad():
        model.hidden(torch.tensor([PROMPT]), attend=lists)
        lists.halve(len(PROMPT))
        for layer in range(2):
            stored = engine.storage.entries_of_pages(layer, sample.pages)  # type: ignore[arg-type]
            for g in range(2):
                assert stored.counts[g] == len(lists.heads[layer][g]) == 12
                for x_GSE, i in ((stored.k_GSE, 0), (stored.v_GSE, 1)):
                    want = torch.stack([e[i] for e in lists.heads[layer][g]]).float()
                    assert torch.allclose(x_GSE[g, :12], want, atol=1e-5)
            assert stored.weight_GS is None, "a changed entry stands for as many tokens as before"
        while engine.busy:
            engine.step()
        for n, token in enumerate(sample.tokens[len(PROMPT) : -1], len(PROMPT)):
            at = torch.tensor([[n]])
            h = model.hidden(torch.tensor([[token]]), positions_BT=at, attend=lists)
            assert int(model.head(h[0])[0].argmax()) == sample.tokens[n + 1]
    assert engine.stats()["thinnings"] == 2
    assert_clean(engine)


@pytest.mark.parametrize("form, close", [("plain", 1e-6), ("int8", 0.03)])
def test_forms_with_pages_store_what_is_given(form: str, close: float) -> None:
    found = []
    for cache_form in ("plain", form):
        engine = Engine(tiny(), None, EngineConfig(block_size=4, cache="400tok", cache_form=cache_form))
        engine.policy = engine.cache.policy = Averaged(None, engine.policy.shape)
        request = Request(PROMPT, PARAMS)
        engine.add(request)
        engine.step()
        found.append(engine.storage.entries_of_pages(0, request.sequences[0].pages).k_GSE[:, :12].float())  # type: ignore[arg-type]
    assert (found[1] - found[0]).norm() <= close * found[0].norm()


def test_forms_without_pages_are_refused_with_eviction() -> None:
    with pytest.raises(UserError, match=r"kivi.*knorm"):
        config = EngineConfig(block_size=8, cache="400tok", kv="knorm:budget=12", cache_form="kivi:group=8,residual=8")
        Engine(tiny(), None, config)


def test_another_number_of_entries_ends_the_request() -> None:
    engine = Engine(tiny(), None, EngineConfig(block_size=4, cache="400tok"))
    engine.policy = engine.cache.policy = Wrong(None, engine.policy.shape)
    engine.add(Request(PROMPT, PARAMS))
    errors = [u.error for u in engine.step() if u.error]
    assert len(errors) == 1 and "12 entries are replaced by" in errors[0]
    assert_clean(engine)
