"""Reference test of kv/critic: the three parts in float64 loops, how many stay, and what the engine then holds."""

from __future__ import annotations

import math

import pytest
import torch
from serve_tools import show, tiny

from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv import CacheShape, Entries
from modicum.serve.kv.critic import Config, Critic, importance, unit
from modicum.serve.request import Request, SamplingParams

SHAPE = CacheShape(layers=1, heads=4, kv_heads=2, head_dim=8, block_size=4, windows=(None,))
H, G, S, D, W = 4, 2, 12, 8, 5


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(h, n, D, generator=generator) for h, n in ((H, W), (G, S), (G, S)))


def rows(q: torch.Tensor, k: torch.Tensor, seen: int | None = None) -> dict[tuple[int, int], list[float]]:
    """(head, token) -> its weights over S entries, one number at a time."""
    table = {}
    for h in range(H):
        for w in range(W):
            t = S - W + w
            first = 0 if seen is None else max(0, t - seen + 1)
            e = [0.0] * S
            for s in range(first, t + 1):
                e[s] = math.exp(float(q[h, w].double() @ k[h * G // H, s].double()) / math.sqrt(D))
            table[h, t] = [x / sum(e) for x in e]
    return table


@pytest.mark.parametrize("seen", [None, 6])
def test_attention_received_and_entropy_of_rows(seen: int | None) -> None:
    q, k, v = states()
    shape = CacheShape(layers=1, heads=H, kv_heads=G, head_dim=D, block_size=4, windows=(seen,))
    attention, entropy, _ = importance(shape, 0, q, k, v, gradient=False)
    table = rows(q, k, seen)
    for s in range(S):
        assert attention[s].item() == pytest.approx(sum(a[s] for a in table.values()), abs=1e-5)
        own = [-sum(p * math.log(p) for p in table[h, s] if p > 0) for h in range(H)] if s >= S - W else [0.0]
        assert entropy[s].item() == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert attention.std() > 0.1, "received attention differs, where sums of rows are all 1"


def test_the_gradient_is_of_the_change_of_the_output() -> None:
    q, k, v = (x.double() for x in states(1))

    def change(k: torch.Tensor, v: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        out = []
        for h in range(H):
            scores = torch.stack([q[h, W - 1] @ k[h * G // H, s] for s in range(S)]) / math.sqrt(D)
            out.append(scores.softmax(0) @ v[h * G // H])
        return (torch.stack(out) - before).pow(2).mean()

    before = torch.stack(
        [(torch.stack([q[h, W - 2] @ k[h * G // H, s] for s in range(S - 1)]) / math.sqrt(D)).softmax(0)
         @ v[h * G // H, : S - 1] for h in range(H)]
    )  # fmt: skip
    expected = torch.zeros(S, dtype=torch.float64)
    for x, at in ((k, 0), (v, 1)):
        for g in range(G):
            for s in range(S):
                for d in range(D):
                    plus, minus = ([k.clone(), v.clone()] for _ in (0, 1))
                    plus[at][g, s, d] += 1e-5
                    minus[at][g, s, d] -= 1e-5
                    slope = (change(*plus, before) - change(*minus, before)) / 2e-5
                    expected[s] += slope.abs()
        assert x.shape == (G, S, D)
    _, _, gradient = importance(SHAPE, 0, q.float(), k.float(), v.float(), gradient=True)
    assert torch.allclose(gradient.double(), expected, rtol=1e-3, atol=1e-5)


def test_parts_are_brought_to_one_scale_and_weighted() -> None:
    q, k, v = states(2)
    parts = importance(SHAPE, 0, q, k, v, gradient=True)
    policy = Critic(Config(attention=1, entropy=2, gradient=5, least=2, window=W), SHAPE).begin(S)
    scores = policy.score(0, q, k, v)
    assert scores.shape == (G, S) and torch.equal(scores[0], scores[1]), "one importance for all heads"
    for s in range(S - 1):
        scaled = [(float(p[s]) - float(p.min())) / (float(p.max()) - float(p.min())) for p in parts]
        assert scores[0, s].item() == pytest.approx((scaled[0] + 2 * scaled[1] + 5 * scaled[2]) / 8, abs=1e-5)
    assert scores[0, -1] == torch.inf and not unit(torch.ones(4)).any()
    without = Critic(Config(gradient=0, least=2, window=W), SHAPE).begin(S).score(0, q, k, v)
    expected = (unit(parts[0]) + unit(parts[1])) / 2
    assert torch.allclose(without[0, :-1], expected[:-1])


@pytest.mark.parametrize(
    ("n", "ratio", "least", "kept"),
    [(10, 0.5, 16, 10), (16, 0.5, 16, 16), (17, 0.5, 16, 16), (100, 0.5, 16, 50), (101, 0.5, 16, 50), (100, 0.1, 4, 90),
     (5, 0.1, 4, 4), (8, 0.01, 4, 7)],
)  # fmt: skip
def test_how_many_stay(n: int, ratio: float, least: int, kept: int) -> None:
    policy = Critic(Config(ratio=ratio, least=least, window=4), SHAPE).begin(n)
    assert policy.capacity(0) == kept and policy.allow(0, n) == kept and policy.allow(0, n + 3) == kept + 3


def test_the_most_important_stay() -> None:
    q, k, v = states(3)
    policy = Critic(Config(ratio=0.5, least=2, window=W), SHAPE).begin(S)
    full = torch.cat([torch.zeros(H, S - W, D), q], 1)
    show(policy, 0, 0, full, k, v)
    positions = torch.arange(S).expand(G, -1)
    kept = policy.keep(0, Entries(k, v, positions, [S] * G)).heads
    best = policy.score(0, q, k, v)[0].topk(6).indices.sort().values
    assert all(torch.equal(h, best) for h in kept) and S - 1 in best


def test_an_engine_keeps_that_many() -> None:
    engine = Engine(tiny(), None, EngineConfig(block_size=4, cache="400tok", kv="critic:ratio=0.5,least=4,window=6"))
    prompt = torch.randint(1, 60, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    engine.add(Request(prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)))
    entries = []
    while engine.requests:
        engine.step()
        sample = next(iter(engine.samples.values()), None)
        if sample is not None and sample.pages is not None:
            entries.append(int(sample.pages.count_LG.max()))
    assert entries[0] == 24 and entries[-1] <= 24 + 6
