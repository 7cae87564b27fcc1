"""multikey: many facts of one kind stand in the text, one or more of them are asked for.

`keys` facts "The secret of KEY is VALUE." lie at random places in a text of `length` words; the prompt
asks for `queries` of them in turn: "The secret of A is" with the earlier answers written out. A model
must bind values to keys, not just find the one fact that stands out.

Arora et al. 2023, arXiv:2312.04927 (multi-query associative recall); Hsieh et al. 2024, arXiv:2404.06654
(RULER, multi-key NIAH). Departs: words instead of symbols; with several queries each is asked with the
right earlier answers, and `words` is the share of them that is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from modicum.evaluate.playground import NOUNS, Playground, PlaygroundConfig, lead, normal, scatter
from modicum.evaluate.tasks import Doc, Generate

SWEEP = {"keys": (2, 16)}


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    length: int = 256
    keys: int = 16
    queries: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.queries <= self.keys, "queries must lie between 1 and keys")
        self.require(self.keys <= len(NOUNS) // 2, f"keys must be at most {len(NOUNS) // 2}")
        self.require(self.length >= 6 * self.keys, "length must be at least 6 words for each key")


TOY = Config(length=80, keys=4, queries=2, examples=20)


class Multikey(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        n = self.config.keys
        words = rng.sample(NOUNS, 2 * n)
        keys, values = words[:n], words[n:]
        facts = [f"The secret of {k} is {v}." for k, v in zip(keys, values, strict=True)]
        queried = rng.sample(range(n), self.config.queries)
        text = scatter(rng, facts, self.config.length)
        questions = " | ".join(keys[i] for i in queried)
        return f"{text} The secrets of {questions} :", " | ".join(values[i] for i in queried)

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        """One request per query, the earlier answers given."""
        before = "".join(self.text(shot) + "\n\n" for shot in shots) + doc["prompt"]
        answers = doc["answer"].split(" | ")
        prompts = [before + "".join(f" {a} |" for a in answers[:i]) for i in range(len(answers))]
        return [Generate(prompt, 8, ("\n", ".", "|"), lead(prompt)) for prompt in prompts]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        answers = doc["answer"].split(" | ")
        right = [normal(reply) == normal(answer) for reply, answer in zip(replies, answers, strict=True)]
        return {"accuracy": float(all(right)), "words": sum(right) / len(right)}
