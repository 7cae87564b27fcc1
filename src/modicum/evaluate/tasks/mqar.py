"""mqar: associative recall with several queries: pairs of words, and the partners of some of them.

    apple = red. dog = tall. ... {filler}  dog = tall. apple = red.

`pairs` keys with values stand first, then `length` words of unrelated sentences in all, then `queries` of the keys in
another order; every queried key is graded after the right answers before it, as in training. `accuracy` is the mean
over a document's queries, chance 1 / pairs (a guess among the values that stand there). `pairs` is the load on a
model's state, `length` the distance.

Arora et al. 2023, arXiv:2312.04927 (Zoology: multi-query associative recall). Departs: words instead of symbols, and
all queries after all pairs instead of at distances drawn by a power law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from modicum.evaluate.playground import ADJECTIVES, NOUNS, Playground, PlaygroundConfig, normal, sentence
from modicum.evaluate.tasks import Doc, Generate

SWEEP = {"pairs": (4, 16)}


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    pairs: int = 8
    queries: int = 4  # keys that are queried, each once
    length: int = 64  # words of the pairs and of the sentences after them

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(2 <= self.pairs <= len(ADJECTIVES), f"pairs must lie in 2 to {len(ADJECTIVES)}")
        self.require(1 <= self.queries <= self.pairs, "queries must lie in 1 to pairs")
        self.require(self.length >= 3 * self.pairs, "length must be at least 3 words for each pair")


TOY = Config(examples=20, pairs=4, queries=2, length=20)


class Mqar(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        c = self.config
        keys, values = rng.sample(NOUNS, c.pairs), rng.sample(ADJECTIVES, c.pairs)
        pairs = [f"{key} = {value}." for key, value in zip(keys, values, strict=True)]
        filler = [sentence(rng) for _ in range(round((c.length - 3 * c.pairs) / 7))]
        queried = [pairs[i].removesuffix(".") for i in rng.sample(range(c.pairs), c.queries)]
        key, _, rest = ". ".join(queried).partition(" = ")
        return f"{' '.join([*pairs, *filler, key])} =", rest

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        before = "".join(f"{self.text(shot)}\n\n" for shot in shots)
        text, requests = doc["prompt"], []
        for following in [*doc["answer"].split(". ")[1:], ""]:
            requests.append(Generate(before + text, 8, ("\n", "."), f"{text.split()[-2]} ="))
            value = doc["answer"].split(". ")[len(requests) - 1].split()[-1]
            text += f" {value}. {following.partition(' = ')[0]} ="
        return requests

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        values = [query.split()[-1] for query in doc["answer"].split(". ")]
        right = [normal(reply) == [value] for reply, value in zip(replies, values, strict=True)]
        return {"accuracy": sum(right) / len(right), "all": float(all(right))}

    def chance(self, doc: Doc) -> float:
        return 1 / self.config.pairs
