"""Reference test of kv/random: equally likely entries, the same in every run, others in every head and layer."""

from __future__ import annotations

import torch

from modicum.serve.kv import CacheShape, Entries
from modicum.serve.kv.random import Config, Random

SHAPE = CacheShape(layers=2, heads=4, kv_heads=2, head_dim=8, block_size=4, windows=(None, None))


def _kept(seed: int, layer: int = 0, n: int = 24) -> list[list[int]]:
    x_GSE = torch.zeros(2, n, 8)
    policy = Random(Config(budget=6, seed=seed), SHAPE).begin(20)
    return [
        index.tolist()
        for index in policy.keep(layer, Entries(x_GSE, x_GSE, torch.arange(n).expand(2, n), [n, n])).heads
    ]


def test_draws_depend_on_seed_layer_and_head_alone() -> None:
    torch.manual_seed(0)
    first = _kept(3)
    torch.manual_seed(1)
    assert _kept(3) == first and first[0] != first[1]
    assert _kept(4) != first and _kept(3, layer=1) != first
    assert all(len(head) == 6 + 4 and head[-4:] == [20, 21, 22, 23] for head in first)


def test_every_entry_is_as_likely_as_any_other() -> None:
    times = [0] * 20
    for seed in range(500):
        for head in _kept(seed, n=20):
            for s in head:
                times[s] += 1
    # 1,000 draws of 6 among 20: 300 each, standard deviation 14.5
    assert sum(times) == 6000 and min(times) > 225 and max(times) < 375
