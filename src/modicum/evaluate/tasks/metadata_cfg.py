"""metadata-cfg: sentences of a grammar whose rules hang on hidden labels, which a part of the training text names.

    {metadata} {words of the sentence}.        metadata: `metadata_depth` labels, then masks; or masks alone

Each of `depth` levels of the grammar uses one of several sets of rules, chosen by a label of its own; the labels are
the text's hidden meaning. With the labels before `fraction` of the training texts (and masks before the rest, so that
the model also knows the plain form), does a model continue a plain text better? Known for certain: `accuracy` is
whether prompt and continuation are a sentence of the grammar under some labels; `gap` how many nats per word the
model's loss of the true rest lies above that of the best possible model, which sums over all labels it cannot see
(`evaluate.grammar`). `shown=true` gives the labels at the test too, and the best model then knows them. `prompt` words
are given: short prompts tell little of the labels.

Higuchi et al. 2025, arXiv:2504.17562: no gain in loss without metadata at the test, worse for short prompts, better
for long ones. Set-up from a summary, the body was not read. Departs: words instead of symbols; `text` is plain text, so
that who trains on it keeps the loss off its first `depth` words (`evaluate.teach`, as the bench does).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from modicum.evaluate import grammar
from modicum.evaluate.playground import ADJECTIVES, NOUNS, Playground, PlaygroundConfig, normal
from modicum.evaluate.tasks import Choose, Doc, Generate

CLAIM = {
    "figure": "better for long prompts, worse for short ones",
    "where": "abstract",
    "scale": "12 layers, width 768",
}
SWEEP = {"metadata_depth": (0, 1, 3)}
MASK = "none"


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    depth: int = 3
    labels: int = 2  # sets of rules per level
    symbols: int = 6  # of the inner levels
    rules: int = 2  # of each symbol
    vocabulary: int = 20  # words
    grammar: int = 0  # seed of the grammar
    metadata_depth: int = 2  # labels that the metadata names, from the top level on
    fraction: float = 0.5  # of the training texts that have metadata
    shown: bool = False  # metadata before the test prompts too
    prompt: int = 6  # words of a sentence that are given

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.depth <= 5 and 1 <= self.labels <= 8, "depth must lie in 1 to 5, labels in 1 to 8")
        self.require(2 <= self.vocabulary <= len(NOUNS), f"vocabulary must lie in 2 to {len(NOUNS)}")
        self.require(0 <= self.metadata_depth <= self.depth, "metadata_depth must lie in 0 to depth")
        self.require(
            0 <= self.fraction <= 1 and 1 <= self.prompt < 2**self.depth, "fraction a fraction, prompt below 2^depth"
        )


TOY = Config(examples=20, labels=1, vocabulary=60, symbols=12, rules=6, prompt=7)


@functools.cache
def made(seed: int, depth: int, symbols: int, vocabulary: int, rules: int, labels: int) -> grammar.Grammar:
    return grammar.random_grammar(seed, depth=depth, symbols=symbols, vocabulary=vocabulary, rules=rules, labels=labels)


class MetadataCfg(Playground):
    config: Config

    @property
    def grammar(self) -> grammar.Grammar:
        c = self.config
        return made(c.grammar, c.depth, c.symbols, c.vocabulary, c.rules, c.labels)

    def make(self, rng: Random) -> tuple[str, str]:
        c = self.config
        symbols, labels = self.grammar.sample(np.random.default_rng(rng.getrandbits(64)))
        words = [NOUNS[s] for s in symbols]
        named = [ADJECTIVES[level * c.labels + label] for level, label in enumerate(labels)]
        self._named = " ".join([*named[: c.metadata_depth], *[MASK] * (c.depth - c.metadata_depth)])
        self._draw, self._labels = rng.random(), labels
        front = self._named if c.shown else " ".join([MASK] * c.depth)
        return f"{front} {' '.join(words[: c.prompt])}", " ".join(words[c.prompt :])

    def docs(self, split: str, limit: int | None, seed: int) -> Any:
        for doc in super().docs(split, limit, seed):
            named = self._draw < self.config.fraction if split == "train" else self.config.shown
            yield doc | {"metadata": self._named if named else "", "labels": self._labels}

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        prompt = "\n\n".join([self.text(shot) for shot in shots] + [doc["prompt"]])
        words = 3**self.config.depth
        return [Generate(prompt, 4 * words + 4, ("\n", ".")), Choose(prompt, (f" {doc['answer']}.",))]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        given = doc["prompt"].split()[self.config.depth :]
        (score,) = replies[1]
        rest = [NOUNS.index(w) for w in doc["answer"].split()]
        known = tuple(doc["labels"]) if self.config.shown and self.config.metadata_depth == self.config.depth else None
        best = self.grammar.nats([*map(NOUNS.index, given), *rest], known)[len(given) :]
        return {
            "accuracy": float(self.grammatical([*given, *normal(replies[0])])),
            "gap": (-score.nats - float(best.sum())) / len(best),
        }

    def grammatical(self, words: Sequence[str]) -> bool:
        """Whether words are a whole sentence of the grammar under some labels."""
        symbol_of = {word: i for i, word in enumerate(NOUNS[: self.config.vocabulary])}
        if not all(word in symbol_of for word in words):
            return False
        symbols = [symbol_of[word] for word in words]
        every = self.grammar.labels()
        return len(words) <= 3**self.config.depth and any(self.grammar.probability(symbols, one) > 0 for one in every)

    def text(self, doc: Doc) -> str:
        front, rest = doc["prompt"].split()[: self.config.depth], doc["prompt"].split()[self.config.depth :]
        metadata = doc["metadata"] or " ".join([MASK] * len(front))
        return f"{metadata} {' '.join(rest)} {doc['answer']}."
