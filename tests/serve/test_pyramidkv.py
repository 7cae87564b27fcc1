"""Reference test of kv/pyramidkv: a line of budgets written out by hand, and the votes within them."""

from __future__ import annotations

import pytest
import torch
from serve_tools import show
from test_snapkv import assert_kept, naive

from modicum.core.errors import UserError
from modicum.serve.kv import CacheShape, Entries
from modicum.serve.kv.pyramidkv import Config, PyramidKV


def _shape(layers: int) -> CacheShape:
    return CacheShape(layers=layers, heads=4, kv_heads=2, head_dim=8, block_size=4, windows=(None,) * layers)


@pytest.mark.parametrize(
    "prompt, knobs, want",
    [
        (100, {"budget": 40, "beta": 4}, [64, 52, 40, 28, 16]),  # window 8, least 8, most 56
        (100, {"budget": 0.4, "beta": 4}, [64, 52, 40, 28, 16]),
        (100, {"budget": 40, "beta": 1}, [40] * 5),
        (
            60,
            {"budget": 40, "beta": 20},
            [60, 50, 40, 30, 20],
        ),  # most would be 62.4: cut to the prompt, rest to the end
        (30, {"budget": 40}, [30] * 5),
    ],
)
def test_budgets_fall_along_a_line_with_the_same_mean(prompt: int, knobs: dict[str, float], want: list[int]) -> None:
    policy = PyramidKV(Config(**{"window": 8} | knobs), _shape(5)).begin(prompt)  # type: ignore[arg-type]
    assert [policy.allow(layer, prompt) for layer in range(5)] == want
    assert [policy.allow(layer, prompt + 3) for layer in range(5)] == [n + 3 for n in want]
    assert bool(policy.observed(prompt - 1, 1)) == (want[-1] < prompt)


def test_means_are_kept_whatever_is_rounded() -> None:
    for prompt in (61, 200, 777):
        for budget in (0.07, 0.31, 0.55, 0.9):
            policy = PyramidKV(Config(budget=budget), _shape(30)).begin(prompt)
            kept = [policy.allow(layer, prompt) for layer in range(30)]
            assert kept == sorted(kept, reverse=True) and max(kept) <= prompt
            assert abs(sum(kept) / 30 - budget * prompt) <= 1.01, (prompt, budget, kept)


@pytest.mark.parametrize("layer", [0, 2])
def test_each_layer_keeps_the_best_of_its_own_budget(layer: int) -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(h, 30, 8, generator=generator) for h in (4, 2, 2))
    policy = PyramidKV(Config(budget=14, window=4, kernel=3, beta=3), _shape(3)).begin(30)
    show(policy, layer, 0, q, k, v)
    kept = list(policy.keep(layer, Entries(k, v, torch.arange(30).expand(2, 30), [30, 30])).heads)
    budget = {0: 21, 2: 7}[layer]
    assert len(kept[0]) == budget
    assert_kept(kept, naive(q, k, 4, 3, "max", 8**-0.5), budget, 30)


def test_knobs_that_cannot_be() -> None:
    for knobs in ({"beta": 0.5}, {"kernel": 4}, {"budget": 8, "window": 8}):
        with pytest.raises(UserError, match="pyramidkv"):
            Config(**knobs)  # type: ignore[arg-type]
