"""port reader: how retrieved passages are laid out in the prompt of the model that answers.

Which passages are shown, and how many tokens each may take, is decided by rank and budget (`ground.compose`), the same
for every reader; a reader decides their order, and what is shown of a passage.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from modicum.core.registry import Method
from modicum.retrieve import ground
from modicum.retrieve.excerpt import excerpt
from modicum.retrieve.search import Hit

BASELINE = "ranked"


class Reader(Method):
    """Base class. A method defines `order`, and `shorten` where it does not show the sentences around the match."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def order(self, count: int) -> list[int]:
        """A permutation of range(count): for each position in the prompt, from the first, the rank shown there."""

    def shorten(self, text: str, question: str, limit: int, count: Callable[[str], int]) -> str:
        """What is shown of a passage, at most `limit` tokens."""
        return excerpt(text, question, limit, count)

    def compose(
        self,
        question: str,
        hits: Sequence[Hit],
        budget: int,
        count: Callable[[str], int],
        system: str = ground.SYSTEM,
    ) -> tuple[ground.Messages, list[ground.Source], int]:
        """(messages, sources as numbered in the prompt, tokens); at most `budget` tokens as `count` measures them."""
        return ground.compose(question, hits, budget, count, system, order=self.order, shorten=self.shorten)
