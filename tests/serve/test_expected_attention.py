"""Reference test of kv/expected-attention: rotations written out as matrices, and queries drawn from the Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from serve_tools import show, tiny
from torch import Tensor

from modicum.core.errors import UserError
from modicum.serve.kv import CacheShape
from modicum.serve.kv.expected_attention import Config, ExpectedAttention

E, PROMPT, SINKS = 8, 40, 2
SHAPE = CacheShape(layers=2, heads=4, kv_heads=2, head_dim=E, block_size=4, windows=(None, None))


def _matrix(place: float, angles: Tensor) -> Tensor:
    """The rotation by a place, (E, E)."""
    turn = torch.eye(E, dtype=torch.float64)
    for i, angle in enumerate(angles.tolist()):
        c, s, j = math.cos(place * angle), math.sin(place * angle), i + len(angles)
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
    return turn


def _given(window: int, future: int) -> tuple[ExpectedAttention, Tensor, Tensor, Tensor, Tensor]:
    model = tiny()
    policy = ExpectedAttention(Config(budget=12, window=window, future=future, sinks=SINKS), SHAPE)
    policy.prepare(model)
    rng = torch.Generator().manual_seed(1)
    k_GSE, v_GSE = (torch.randn(2, PROMPT, E, generator=rng) for _ in range(2))
    # Queries before rotation, far from zero and with a covariance that is not a multiple of the identity.
    plain_HTE = torch.randn(4, PROMPT, E, generator=rng) @ torch.randn(E, E, generator=rng) * 0.4 + 0.7
    return policy, plain_HTE, k_GSE, v_GSE, model.rope_tables()[0].angles  # type: ignore[union-attr]


def _score(policy: ExpectedAttention, plain_HTE: Tensor, k_GSE: Tensor, v_GSE: Tensor, angles: Tensor) -> Tensor:
    turned_HTE = torch.stack([plain_HTE[:, t].double() @ _matrix(t, angles).T for t in range(PROMPT)], dim=1).float()
    mine = policy.begin(PROMPT)
    for start, n in ((0, 25), (25, 15)):
        show(mine, 0, start, turned_HTE[:, start : start + n], k_GSE, v_GSE)
    return mine.score(0, mine.queries[0], k_GSE, v_GSE)


@pytest.mark.parametrize("window", [20, 64])
def test_scores_are_the_closed_form_of_the_moments(window: int) -> None:
    policy, plain_HTE, k_GSE, v_GSE, angles = _given(window, future=16)
    got_GS = _score(policy, plain_HTE, k_GSE, v_GSE, angles)
    turn = sum(_matrix(t, angles) for t in range(PROMPT, PROMPT + 16)) / 16
    first = max(SINKS, PROMPT - window)
    assert bool((got_GS[:, :SINKS] == float("inf")).all())
    for g in range(2):
        want = torch.zeros(PROMPT - SINKS, dtype=torch.float64)
        for r in range(2):
            q_TE = plain_HTE[2 * g + r, first:].double()
            mean, cov = turn @ q_TE.mean(0), turn @ q_TE.T.cov(correction=0) @ turn.T
            k_SE = k_GSE[g, SINKS:].double() / math.sqrt(E)
            want += torch.stack([k @ mean + k @ cov @ k / 2 for k in k_SE]).softmax(0) / 2
        want *= v_GSE[g, SINKS:].double().norm(dim=-1)
        assert torch.allclose(got_GS[g, SINKS:].double(), want, rtol=1e-4)


def test_the_closed_form_is_the_mean_over_queries_drawn() -> None:
    """One place ahead, so that the mean rotation is a rotation: E[exp(q k c)] by drawing 400,000 queries."""
    policy, plain_HTE, k_GSE, v_GSE, angles = _given(64, future=1)
    got_GS = _score(policy, plain_HTE, k_GSE[:, :, :] * 0.5, v_GSE, angles)
    turn = _matrix(PROMPT, angles)
    rng = torch.Generator().manual_seed(2)
    for g in range(2):
        drawn = torch.zeros(PROMPT - SINKS, dtype=torch.float64)
        for r in range(2):
            q_TE = plain_HTE[2 * g + r, SINKS:].double()
            root = torch.linalg.cholesky(q_TE.T.cov(correction=0))
            q_NE = (torch.randn(400_000, E, generator=rng, dtype=torch.float64) @ root.T + q_TE.mean(0)) @ turn.T
            weights_S = (q_NE @ (k_GSE[g, SINKS:].double() * 0.5).T / math.sqrt(E)).exp().mean(0)
            drawn += weights_S / weights_S.sum() / 2
        drawn *= v_GSE[g, SINKS:].double().norm(dim=-1)
        assert torch.allclose(got_GS[g, SINKS:].double(), drawn, rtol=0.05)


def test_only_the_window_and_no_sink_is_the_sample() -> None:
    policy, plain_HTE, k_GSE, v_GSE, angles = _given(64, future=16)
    want = _score(policy, plain_HTE, k_GSE, v_GSE, angles)
    plain_HTE[:, :SINKS] *= 50
    assert torch.equal(_score(policy, plain_HTE, k_GSE, v_GSE, angles), want)
    narrow = _given(20, future=16)[0]
    want = _score(narrow, plain_HTE, k_GSE, v_GSE, angles)
    plain_HTE[:, : PROMPT - 20] *= 3
    assert torch.equal(_score(narrow, plain_HTE, k_GSE, v_GSE, angles), want)
    assert narrow.tail == 20 and narrow.begin(PROMPT).allow(0, PROMPT) == 12


def test_knobs_that_cannot_be() -> None:
    for knobs in ({"budget": 0}, {"window": 1}, {"future": 0}, {"sinks": -1}):
        with pytest.raises(UserError, match="expected-attention"):
            Config(**knobs)  # type: ignore[arg-type]
