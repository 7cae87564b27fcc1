"""What one engine step computes: so many tokens of each of its sequences, in one row."""

from __future__ import annotations

from dataclasses import dataclass

from modicum.serve.drafters import Tree
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
    works.sort(key=lambda w: ((w.n > 1) + (w.n > 1 and w.tree is None), w.sample.pages is not None,
                              w.n if w.tree is not None else 0, w.start))
    at = 0
    for w in works:
        w.at = at
        at += w.n
    return works


def by_policy(w: Work) -> bool:
    """Whether a sequence's policy attends in its own way by now."""
    policy = w.sample.policy
    return policy is not None and policy.attends and w.start + w.n > policy.exact
