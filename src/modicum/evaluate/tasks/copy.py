"""copy: a list of words must be written out again.

"Copy: w1 w2 ... wn. Again:" is followed by the same `length` words. The distance between a word and its
copy is constant, so attention solves it with one induction step and a fixed-size state fails beyond its
capacity.

Jelassi et al. 2024, arXiv:2402.01032 (Repeat After Me). Departs: natural words instead of letters, exact
match of the whole list plus the share of words in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from modicum.evaluate.playground import NOUNS, Playground, PlaygroundConfig

SWEEP = {"length": (8, 32)}


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    length: int = 32  # words to copy
    distinct: bool = False  # no word twice: then the last word alone tells what comes next

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.length >= 1, "length must be at least 1 word")
        self.require(not self.distinct or self.length <= len(NOUNS), f"length must be at most {len(NOUNS)}")


TOY = Config(length=8, examples=20)


class Copy(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        pick = rng.sample if self.config.distinct else rng.choices
        words = " ".join(pick(NOUNS, k=self.config.length))
        return f"Copy: {words}. Again:", words
