"""port transform: what is changed in a document's tokens before they are learnt.

A method is constructed as `cls(config, source)` and says there what it lacks. It sees one span of a document at a
time, as it stands in a row, and gives its tokens, targets and extras (a weight or score for each token) back:
changed, with more tokens, or with some of its targets masked from the loss. All of it follows from the span and the
position alone, so that it has no state. Several transforms act one after another in the order given.

What a transform adds takes space in the row; the text that it displaces comes in the next one, and none is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modicum.core.registry import Method
from modicum.data.batch import Span, Tokens
from modicum.data.shards import Documents

BASELINE = "none"
SEVERAL = True


@dataclass(frozen=True)
class Source:
    """What a stream reads, and for how long. total: tokens of the run, None if not known."""

    documents: Documents
    sequence_length: int
    total: float | None
    seed: int


@dataclass(frozen=True)
class Position:
    """Where a span stands: its row, counted from the run's first; its number in the row; the share of the run that is
    done, None if its length is not known."""

    row: int
    number: int
    progress: float | None
    seed: int

    def rng(self) -> np.random.Generator:
        """A generator of its own for this position."""
        return np.random.Generator(np.random.PCG64([self.seed, self.row, self.number]))


class Transform(Method):
    """Base class: fill `apply`, and `added` if it makes spans longer."""

    conflicts: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any, source: Source):
        self.config, self.source = config, source

    def added(self, span: Span, at: Position) -> int:
        """Tokens that `apply` will add to the span, however long it is: the rest may go to the next row."""
        return 0

    def apply(self, tokens: Tokens, span: Span, at: Position) -> Tokens:
        """The tokens of `span` as they are learnt."""
        return tokens
