"""What holds for any mixture."""

from __future__ import annotations

import math

from modicum.core import registry
from modicum.core.errors import UserError

SIZES = {"prose": 9_000, "code": 1_000}


def _make(key: str):
    loaded = registry.load("mixture", key)
    return loaded.cls(getattr(loaded.module, "TOY", loaded.config()), SIZES)


def check_weights(key: str) -> None:
    """Finite, not negative, only known domains, not all zero, at the start, the middle and the end.

    A mixture that needs the run's length may refuse one of unknown length, with a `UserError`.
    """
    mixture = _make(key)
    for total in (None, 10_000):
        for done in (0, 5_000, 10_000):
            try:
                weights = mixture.weights(done, total)
            except UserError:
                assert total is None, f"{key}: refuses a run of known length"
                continue
            assert set(weights) <= set(SIZES), f"{key}: weights for unknown domains: {weights}"
            assert all(math.isfinite(w) and w >= 0 for w in weights.values()), f"{key}: {weights}"
            assert sum(weights.values()) > 0, f"{key}: no domain has weight at {done}/{total}"


def check_pure(key: str) -> None:
    """Weights depend on done and total alone, so that a resumed run draws what the first would have drawn."""
    first, second = _make(key), _make(key)
    forwards = [first.weights(done, 10_000) for done in range(0, 10_001, 500)]
    backwards = [second.weights(done, 10_000) for done in range(10_000, -1, -500)]
    assert forwards == backwards[::-1], f"{key}: weights depend on what was asked before"
