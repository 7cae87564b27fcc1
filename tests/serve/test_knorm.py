"""Reference test of kv/knorm: norms of keys, one by one in float64."""

from __future__ import annotations

import math

import pytest
import torch

from modicum.core.errors import UserError
from modicum.serve.kv import CacheShape, Entries
from modicum.serve.kv.knorm import Config, KNorm

SHAPE = CacheShape(layers=1, heads=4, kv_heads=2, head_dim=8, block_size=4, windows=(None,))


def test_short_keys_of_the_prompt_stay_and_so_does_what_is_generated() -> None:
    generator = torch.Generator().manual_seed(1)
    k_GSE, v_GSE = (torch.randn(2, 24, 8, generator=generator) for _ in range(2))
    k_GSE[:, 20:] *= 100  # generated, and long
    policy = KNorm(Config(budget=7), SHAPE).begin(20)
    assert not policy.observed(0, 20) and policy.tail == 1, "nothing is observed: a found prefix may be whole"
    kept = policy.keep(0, Entries(k_GSE, v_GSE, torch.arange(24).expand(2, 24), [24, 24])).heads
    for g in range(2):
        norms = [math.sqrt(sum(float(x) ** 2 for x in k_GSE[g, s].double())) for s in range(20)]
        shortest = sorted(sorted(range(20), key=norms.__getitem__)[:7])
        assert kept[g].tolist() == [*shortest, 20, 21, 22, 23]
    assert kept[0].tolist() != kept[1].tolist()
    assert (policy.allow(0, 19), policy.allow(0, 20), policy.allow(0, 24)) == (19, 7, 11)


def test_a_budget_that_cannot_be() -> None:
    with pytest.raises(UserError, match="knorm"):
        Config(budget=1.5)
