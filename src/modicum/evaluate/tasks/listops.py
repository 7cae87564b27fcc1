"""listops: the value of nested lists of digits under maximum, minimum, median and sum modulo ten.

    "[MAX 4 [MIN 7 2 9] 0 ] ="    is answered by 4; ten classes

A tree is drawn of at most `depth` levels with lists of 2 to `width` members; trees of more than `length` tokens (a
digit, an operator with its bracket, a closing bracket) are drawn again. The median of an even number of members is the
lower of the middle two.

Nangia & Bowman 2018, arXiv:1804.06028; in Long Range Arena (Tay et al. 2021, arXiv:2011.04006) with lists of up to
2,000 tokens. Amos et al. 2024, arXiv:2310.02980, compare architectures on it from scratch and after pretraining on its
own inputs. Departs: short enough for decoders of a million parameters by default; the original takes the mean of the
two middle members of even lists, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from modicum.evaluate.playground import Playground, PlaygroundConfig

Tree = Any  # a digit, or [operator, member, member, ...]
OPERATORS = ("MAX", "MIN", "MED", "SM")


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    depth: int = 3
    width: int = 4
    length: int = 40  # most tokens of an expression
    nested: float = 0.35  # probability that a member is a list again

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.depth <= 10, "depth must lie between 1 and 10")
        self.require(2 <= self.width <= 10, "width must lie between 2 and 10")
        self.require(self.length >= 4, "length must be at least 4")
        self.require(0 <= self.nested <= 1, "nested must lie between 0 and 1")


TOY = Config(examples=20, depth=1, width=3)


class Listops(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        tree = self._tree(rng, self.config.depth)
        while size(tree) > self.config.length:
            tree = self._tree(rng, self.config.depth)
        return f"{written(tree)} =", str(value(tree))

    def _tree(self, rng: Random, depth: int) -> Tree:
        members = [
            self._tree(rng, depth - 1) if depth > 1 and rng.random() < self.config.nested else rng.randrange(10)
            for _ in range(rng.randint(2, self.config.width))
        ]
        return [rng.choice(OPERATORS), *members]


def value(tree: Tree) -> int:
    if isinstance(tree, int):
        return tree
    members = sorted(value(member) for member in tree[1:])
    if tree[0] == "MAX":
        return members[-1]
    if tree[0] == "MIN":
        return members[0]
    if tree[0] == "MED":
        return members[(len(members) - 1) // 2]
    return sum(members) % 10


def size(tree: Tree) -> int:
    return 1 if isinstance(tree, int) else 2 + sum(size(member) for member in tree[1:])


def written(tree: Tree) -> str:
    return str(tree) if isinstance(tree, int) else f"[{tree[0]} {' '.join(map(written, tree[1:]))} ]"
