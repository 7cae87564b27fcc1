"""none: draft nothing.

Every forward pass gives each sequence one token.

    tokens per forward = 1

What the others are measured against; the engine leaves all of drafting out. No departures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modicum.serve.drafters import EMPTY, Drafter, Tree


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Nothing(Drafter):
    config: Config
    drafts = False

    def propose(self, tokens: Sequence[int], budget: int) -> Tree:
        return EMPTY
