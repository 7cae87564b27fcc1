"""needle: one fact hidden in a long text must be repeated.

A text of `length` words of filler holds "The secret of KEY is VALUE." at a random (or given) depth; the
prompt ends with "The secret of KEY is" and the answer is the value. Chance is about one in 320 to the
number of value words.

Kamradt 2023 (github.com/gkamradt/LLMTest_NeedleInAHaystack); Hsieh et al. 2024, arXiv:2404.06654 (RULER,
single NIAH). Departs from both: the filler is synthetic, so the answer cannot stand in it by chance or
be known from training, and the depth is random unless set.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from modicum.evaluate.playground import NOUNS, Playground, PlaygroundConfig, scatter


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    length: int = 256  # words of the text
    depth: float | None = None  # place of the fact: 0 the beginning, 1 the end, None random
    value_words: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.length >= 16, "length must be at least 16 words")
        self.require(self.depth is None or 0 <= self.depth <= 1, "depth must lie between 0 and 1")
        self.require(1 <= self.value_words <= 16, "value_words must lie between 1 and 16")


TOY = Config(length=40, examples=20)


class Needle(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        key, *value = rng.sample(NOUNS, 1 + self.config.value_words)
        answer = " ".join(value)
        depths = None if self.config.depth is None else [self.config.depth]
        text = scatter(rng, [f"The secret of {key} is {answer}."], self.config.length, depths)
        return f"{text} The secret of {key} is", answer
