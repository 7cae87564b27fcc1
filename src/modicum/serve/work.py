"""What one engine step computes: so many tokens of each of its sequences, in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.serve.drafters import Tree, layout
from modicum.serve.request import Sample


@dataclass(slots=True)
class Work:
    """`n` tokens of a sequence of which `start` are cached; they are row places `at` .. `at + n - 1`.

    With a `tree` the first is the sequence's last known token and the others are drafted below it.
    """

    sample: Sample
    start: int
    n: int
    at: int = 0
    tree: Tree | None = None


def arrange(works: list[Work]) -> list[Work]:
    """Row order: single tokens (whole caches by length, then thinned ones), trees by size, pieces; places set."""
    works.sort(
        key=lambda w: (
            (w.n > 1) + (w.n > 1 and w.tree is None),
            w.sample.pages is not None,
            w.n if w.tree is not None else 0,
            w.start,
        )
    )
    at = 0
    for w in works:
        w.at = at
        at += w.n
    return works


def tokens_of(works: Sequence[Work]) -> list[int]:
    """The step's row of tokens: known ones, and drafted ones behind them."""
    row: list[int] = []
    for w in works:
        row += w.sample.tokens[w.start : w.start + (w.n if w.tree is None else 1)]
        if w.tree is not None:
            row += w.tree.tokens_N.tolist()
    return row


def positions_of(works: Sequence[Work]) -> list[int]:
    """A drafted token has the position of its depth in the tree."""
    row: list[int] = []
    for w in works:
        row += range(w.start, w.start + w.n) if w.tree is None else (w.start + layout(w.tree).depth_X).tolist()
    return row


def places_of(works: Sequence[Work]) -> np.ndarray:
    """Which entries of its sequence's cache each of the step's tokens takes, (T,)."""
    return np.concatenate([np.arange(w.start, w.start + w.n) for w in works])


def by_policy(w: Work) -> bool:
    """Whether a sequence's policy attends in its own way by now."""
    policy = w.sample.policy
    return policy is not None and policy.attends and w.start + w.n > policy.exact
