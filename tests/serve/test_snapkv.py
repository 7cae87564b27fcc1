"""Reference test of kv/snapkv: votes counted one by one in float64, and what the engine then holds."""

from __future__ import annotations

import math

import pytest
import torch
from serve_tools import show, tiny

from modicum.core.errors import UserError
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.kv import CacheShape, Entries
from modicum.serve.kv.snapkv import Config, SnapKV
from modicum.serve.request import Request, SamplingParams

SHAPE = CacheShape(layers=1, heads=4, kv_heads=2, head_dim=8, block_size=4, windows=(None,))


def naive(
    q: torch.Tensor, k: torch.Tensor, window: int, kernel: int, pooling: str, scale: float, seen: int | None = None
) -> list[list[float]]:
    """Votes per KV head and old place; every vote is one number."""
    H, n, G = q.shape[0], k.shape[1], k.shape[0]
    old, R = n - window, H // G
    totals = []
    for g in range(G):
        total = [0.0] * old
        for r in range(R):
            votes = [0.0] * old
            for t in range(old, n):
                first = 0 if seen is None else max(0, t - seen + 1)
                scores = [scale * float(q[g * R + r, t].double() @ k[g, s].double()) for s in range(first, t + 1)]
                norm = sum(math.exp(x) for x in scores)
                for s in range(first, min(old, t + 1)):
                    votes[s] += math.exp(scores[s - first]) / norm
            for s in range(old):
                near = votes[max(0, s - kernel // 2) : s + kernel // 2 + 1]
                total[s] += sum(near) / kernel if pooling == "mean" else max(near)
        totals.append(total)
    return totals


def assert_kept(kept: list[torch.Tensor], votes: list[list[float]], keep: int, n: int) -> None:
    """The best of the old places, ties aside, and all places after them."""
    for index, total in zip(kept, votes, strict=True):
        best, rest = index.tolist()[: keep - (n - len(total))], index.tolist()[keep - (n - len(total)) :]
        assert rest == list(range(len(total), len(total) + len(rest)))
        assert len(best) == keep - (n - len(total)) and best == sorted(set(best))
        left = max(total[s] for s in range(len(total)) if s not in best)
        assert min(total[s] for s in best) >= left - 1e-6


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("pieces", [[30], [12, 9, 9], [28, 1, 1], [25, 2, 3]])
def test_keeps_what_the_window_votes_for(pooling: str, pieces: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(h, 30, 8, generator=generator) for h in (4, 2, 2))
    policy = SnapKV(Config(budget=11, window=4, kernel=3, pooling=pooling), SHAPE).begin(30)
    start = 0
    for n in pieces:
        part = slice(start, start + n)
        show(policy, 0, start, q[:, part], k[:, part], v[:, part])
        start += n
    entries = Entries(k, v, torch.arange(30).expand(2, 30), [30, 30])
    kept = list(policy.keep(0, entries).heads)
    assert_kept(kept, naive(q, k, 4, 3, pooling, 8**-0.5), 11, 30)
    assert kept[0].tolist() != kept[1].tolist()
    assert policy.allow(0, 29) == 29 and policy.allow(0, 30) == 11 and policy.allow(0, 50) == 31


def test_a_layer_with_a_sliding_window_votes_within_it_at_its_own_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(h, 30, 8, generator=generator) for h in (4, 2, 2))
    shape = CacheShape(
        layers=1, heads=4, kv_heads=2, head_dim=8, block_size=4, windows=(12,), scales=(0.9,), softcap=None
    )
    policy = SnapKV(Config(budget=9, window=4, kernel=1), shape).begin(30)
    show(policy, 0, 0, q, k, v)
    kept = policy.keep(0, Entries(k, v, torch.arange(30).expand(2, 30), [30, 30])).heads
    assert_kept(list(kept), naive(q, k, 4, 1, "mean", 0.9, seen=12), 9, 30)


def test_what_was_generated_before_a_preemption_stays() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(h, 36, 8, generator=generator) for h in (4, 2, 2))
    policy = SnapKV(Config(budget=11, window=4, kernel=3), SHAPE).begin(30)
    show(policy, 0, 0, q, k, v)
    kept = policy.keep(0, Entries(k, v, torch.arange(36).expand(2, 36), [36, 36])).heads
    assert all(index.tolist()[-6:] == list(range(30, 36)) and len(index) == 17 for index in kept)
    assert_kept([index[:11] for index in kept], naive(q[:, :30], k[:, :30], 4, 3, "mean", 8**-0.5), 11, 30)


def test_a_share_is_of_each_prompt_and_small_ones_leave_room_for_old_entries() -> None:
    policy = SnapKV(Config(budget=0.25, window=32), SHAPE)
    long, short = policy.begin(400), policy.begin(40)
    assert (long.allow(0, 400), short.allow(0, 40)) == (100, 10)
    assert short.observed(0, 35) == range(35, 35) and short.observed(0, 38) == range(35, 38)
    assert short.observed(35, 1) == range(35, 36) and short.observed(0, 42) == range(35, 40)
    assert not short.observed(40, 1), "generated tokens are not observed"
    assert not policy.begin(4).observed(0, 4) or policy.begin(4).allow(0, 4) < 4


def test_memory_is_given_back_and_shared_blocks_stay() -> None:
    model, prompt = tiny(), [int(t) for t in torch.randint(1, 60, (64,), generator=torch.Generator().manual_seed(4))]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    config = EngineConfig(block_size=4, cache="400tok", kv="snapkv:budget=16,window=4")
    engine = Engine(model, None, config)
    held = []
    first, second = Request(prompt, params), Request(prompt, params)
    engine.add(first)
    while engine.requests:
        engine.step()
        sample = next(iter(engine.samples.values()), None)
        if sample is not None and sample.pages is not None:
            held.append(int(sample.pages.count_LG.max()))
    assert held[0] == 16 and held[-1] <= 16 + 6
    assert engine.blocks.remembered >= 15, "the prompt's full blocks can still be found"
    engine.add(second)
    engine.step()
    assert second.cached >= 56, "a prefix computed with the full cache is found again"
    sample = engine.samples[second.sequences[0].id]
    assert sample.pages is not None and not sample.blocks
    engine.abort(second.id)
    assert engine.blocks.free == engine.blocks.n_blocks


def test_a_preempted_sequence_observes_its_prompts_end_again() -> None:
    """After each number of generated tokens, at the default sizes: what the prefix cache holds must not hide it."""
    rng = torch.Generator().manual_seed(5)
    prompt, beside = (torch.randint(1, 400, (n,), generator=rng).tolist() for n in (47, 47))
    params = SamplingParams(temperature=0, max_tokens=42, ignore_eos=True)
    engine = Engine(tiny(), None, EngineConfig(cache="1ktok", kv="snapkv:budget=40"))
    want = engine.generate([beside], params)[0].tokens
    for generated in range(1, 41):
        engine.blocks.clear()
        first, second = Request(prompt, params), Request(beside, params)
        engine.add(first)
        sample = first.sequences[0]
        while len(sample.tokens) < len(prompt) + generated:
            engine.step()
        engine.preempt(sample)
        engine.cache.look_up(sample)
        assert sample.job.hit <= len(prompt) - engine.policy.tail, "the queries that observe are computed anew"
        engine.add(second)
        while engine.busy:
            assert not any(update.error for update in engine.step()), f"after {generated} generated tokens"
        assert second.sequences[0].tokens[47:] == want and len(sample.tokens) == 47 + 42
    assert engine.stats()["preemptions"] == 40


def test_four_equal_prompts_in_a_small_cache() -> None:
    """Preempted by themselves, and found in the prefix cache on coming back."""
    prompt = torch.randint(1, 400, (40,), generator=torch.Generator().manual_seed(6)).tolist()
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for cache in ("84tok", "96tok"):
        engine = Engine(tiny(), None, EngineConfig(block_size=4, cache=cache, kv="snapkv:budget=24,window=16"))
        assert [len(o.tokens) for o in engine.generate([prompt] * 4, params)] == [30] * 4
        assert engine.stats()["preemptions"] > 0 and engine.stats()["failures"] == 0


def test_knobs_that_cannot_be() -> None:
    for knobs in ({"budget": 0}, {"budget": 1.5}, {"budget": 16, "window": 16}, {"kernel": 4}, {"pooling": "sum"}):
        with pytest.raises(UserError, match="snapkv"):
            Config(**knobs)  # type: ignore[arg-type]
