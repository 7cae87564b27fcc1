"""nhop: a chain of facts must be followed to its end.

Facts "From A go to B." of `chains` chains of `hops` steps each lie shuffled in a text of `length` words;
the prompt asks where `hops` steps from the start of one chain lead, the answer is that chain's last
word. Every chain is equally long, so no step can be guessed from counts.

Hsieh et al. 2024, arXiv:2404.06654 (RULER, variable tracking). Departs: the end of the chain is asked
for instead of all its members, places instead of variables.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random

from modicum.evaluate.playground import NOUNS, Playground, PlaygroundConfig, scatter

SWEEP = {"hops": (1, 2)}


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    length: int = 128
    hops: int = 2
    chains: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.hops >= 1 and self.chains >= 1, "hops and chains must be at least 1")
        self.require((self.hops + 1) * self.chains <= len(NOUNS), f"(hops + 1) * chains must be at most {len(NOUNS)}")
        self.require(self.length >= 5 * self.hops * self.chains, "length must be at least 5 words for each fact")


TOY = Config(length=64, examples=20)


class NHop(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        size, n = self.config.hops + 1, self.config.chains
        words = rng.sample(NOUNS, size * n)
        chains = [words[size * i : size * (i + 1)] for i in range(n)]
        facts = [f"From {a} go to {b}." for chain in chains for a, b in itertools.pairwise(chain)]
        queried = rng.choice(chains)
        steps = "1 step" if self.config.hops == 1 else f"{self.config.hops} steps"
        return f"{scatter(rng, facts, self.config.length)} From {queried[0]} after {steps} comes", queried[-1]
