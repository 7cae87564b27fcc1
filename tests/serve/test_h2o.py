"""Reference test of kv/h2o: attention summed entry by entry over plain lists, prompt and generated tokens alike."""

from __future__ import annotations

import pytest
import torch
from serve_tools import assert_clean, tiny
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.config import by_layer, llama_like
from modicum.model.decoder import Decoder
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv import CacheShape, Entries
from modicum.serve.kv.h2o import H2O, Config
from modicum.serve.request import Request, SamplingParams

BLOCK, BUDGET, RECENT = 4, 16, 8


class Lists:
    """An `attend` over one list of (key, value, place, attention received) per layer and KV head, in float64."""

    def __init__(self, model: Decoder):
        self.heads: list[list[list[list]]] = [
            [[] for _ in range(model.config.kv_heads)] for _ in range(model.config.layers)
        ]
        self.n = 0

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, softcap: float | None
    ) -> Tensor:
        out = torch.empty_like(q)
        R = q.shape[1] // k.shape[1]
        for t in range(q.shape[2]):
            for g, entries in enumerate(self.heads[layer]):
                entries.append([k[0, g, t].double(), v[0, g, t].double(), self.n + t, 0.0])
                seen = [e for e in entries if window is None or e[2] > self.n + t - window]
                for r in range(R):
                    scores = torch.stack([q[0, g * R + r, t].double() @ e[0] * scale for e in seen])
                    weights = scores.softmax(0)
                    for e, w in zip(seen, weights.tolist(), strict=True):
                        e[3] += w / R
                    out[0, g * R + r, t] = sum(w * e[1] for w, e in zip(weights, seen, strict=True)).float()
        return out

    def commit(self, n: int, prompt: int) -> None:
        self.n += n
        ended = self.n - n < prompt <= self.n
        if self.n < prompt or (not ended and self.n // BLOCK == (self.n - n) // BLOCK):
            return
        if len(self.heads[0][0]) <= BUDGET + (0 if ended else BLOCK):
            return
        for layer in self.heads:
            for g, entries in enumerate(layer):
                heavy = sorted(entries[:-RECENT], key=lambda e: -e[3])[: BUDGET - RECENT]
                layer[g] = sorted(heavy, key=lambda e: e[2]) + entries[-RECENT:]

    def places(self) -> list[list[list[int]]]:
        return [[[e[2] for e in entries] for entries in layer] for layer in self.heads]


def _prompt(n: int) -> list[int]:
    return torch.randint(1, 400, (n,), generator=torch.Generator().manual_seed(n)).tolist()


@pytest.mark.parametrize("window", [None, 14])
@pytest.mark.parametrize("piece", [None, 16])
def test_the_engine_holds_what_the_lists_hold(window: int | None, piece: int | None) -> None:
    model = tiny()
    if window is not None:
        shape = llama_like(
            400, 32, 2, heads=4, kv_heads=2, context_length=256, overrides=by_layer(window=(window, None))
        )
        other = Decoder(shape)
        other.load_state_dict(model.state_dict())
        model = other
    config = EngineConfig(
        block_size=BLOCK,
        cache="400tok",
        kv=f"h2o:budget={BUDGET}",
        prefix_cache=False,
        chunked_prefill=piece is not None,
        max_batch_tokens=piece or 2048,
    )
    engine, prompts = Engine(model, None, config), [_prompt(37), _prompt(50)]
    requests = [Request(p, SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)) for p in prompts]
    lists = [Lists(model) for _ in prompts]
    for request in requests:
        engine.add(request)
    thinned = 0
    while engine.busy:
        before = [r.sequences[0].job.computed for r in requests]
        running = [r.sequences[0] for r in requests]
        engine.step()
        for sample, attend, prompt, start in zip(running, lists, prompts, before, strict=True):
            n = sample.job.computed - start
            if n:
                with torch.no_grad():
                    at = torch.arange(start, start + n)[None]
                    model.hidden(torch.tensor([sample.tokens[start : start + n]]), positions_BT=at, attend=attend)
                attend.commit(n, len(prompt))
            if sample.pages is not None:
                thinned += 1
                for layer in range(2):
                    held = engine.storage.entries_of_pages(layer, sample.pages)
                    got = [held.position_GS[g, : held.counts[g]].tolist() for g in range(2)]
                    assert got == attend.places()[layer], f"after {sample.job.computed} tokens"
                assert max(held.counts) < BUDGET + 2 * BLOCK
    assert thinned >= 26
    assert_clean(engine)


def test_sums_are_not_means_and_new_rows_count() -> None:
    """An early entry of many small weights beats a late one of larger weights on average; later rows turn it round."""
    shape = CacheShape(layers=1, heads=2, kv_heads=1, head_dim=4, block_size=4, windows=(None,))
    policy = H2O(Config(budget=4, recent=0.5), shape).begin(6)
    x_GSE = torch.zeros(1, 6, 4)
    policy.mark(0, torch.tensor([[2.0, 0.9, 0.2, 0.8, 0.1, 0.1]]))
    kept = policy.keep(0, Entries(x_GSE, x_GSE, torch.arange(6).expand(1, 6), [6])).heads
    assert kept[0].tolist() == [0, 1, 4, 5]
    policy.mark(0, torch.tensor([[0.0, 0.1, 3.0, 0.1, 0.5]]))
    place = torch.tensor([[0, 1, 4, 5, 6]])
    kept = policy.keep(0, Entries(x_GSE[:, :5], x_GSE[:, :5], place, [5])).heads
    assert kept[0].tolist() == [0, 2, 3, 4], "place 4 has 3.1 by now, place 1 has 1.0"


def test_it_is_refused_with_the_prefix_cache_and_for_odd_knobs() -> None:
    with pytest.raises(UserError, match="h2o"):
        Engine(tiny(), None, EngineConfig(cache="1ktok", kv="h2o"))
    with pytest.raises(UserError, match="recent"):
        Config(recent=1)
