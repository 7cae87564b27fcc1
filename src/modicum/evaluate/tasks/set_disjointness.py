"""set-disjointness: two lists of words, and the one word that stands in both.

    First: apple, dog, cup. Second: moon, dog, ice, ... Common: dog

`first` and `second` words, all different but for one in common, at random positions. Reading once with little state,
it is best to remember the shorter list, so `first=4,second=64` is easy where it comes first and hard where it does not.
Chance is 1 / min(first, second). `answer=decide` asks whether there is a common word at all, which half of the
documents have: by the likelihood of yes and no, chance 1/2.

Arora et al. 2024, arXiv:2407.05483 (Just Read Twice, section 3: set disjointness). Departs: words instead of symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from modicum.evaluate.playground import NOUNS, Playground, PlaygroundConfig, normal
from modicum.evaluate.tasks import Choose, Doc

SWEEP = {"second": (8, 32)}
DECIDED = ("yes", "no")


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    first: int = 8
    second: int = 8
    answer: str = "word"  # or decide

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(min(self.first, self.second) >= 2, "first and second must be at least 2")
        most = len(NOUNS) + 1
        self.require(self.first + self.second <= most, f"first + second must be at most {most}, the words there are")
        self.require(self.answer in ("word", "decide"), "answer must be word or decide")


TOY = Config(examples=20, first=4, second=6)


class SetDisjointness(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        c = self.config
        both = c.answer == "word" or rng.random() < 0.5
        words = rng.sample(NOUNS, c.first + c.second - both)
        common = words[:1] if both else []
        rest = words[len(common) :]
        first = rng.sample([*common, *rest[: c.first - len(common)]], c.first)
        second = rng.sample([*common, *rest[c.first - len(common) :]], c.second)
        prompt = f"First: {', '.join(first)}. Second: {', '.join(second)}."
        if c.answer == "decide":
            return f"{prompt} Is a word in both?", DECIDED[not both]
        return f"{prompt} Common:", common[0]

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        requests = super().requests(doc, shots)
        if self.config.answer == "word":
            return requests
        return [Choose(requests[0].prompt, tuple(f" {word}." for word in DECIDED))]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        if self.config.answer == "word":
            return {"accuracy": float(normal(replies[0]) == [doc["answer"]])}
        yes, no = replies[0]
        return {"accuracy": float(DECIDED[no.nats > yes.nats] == doc["answer"])}

    def chance(self, doc: Doc) -> float:
        return 0.5 if self.config.answer == "decide" else 1 / min(self.config.first, self.config.second)
