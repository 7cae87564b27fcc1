"""token-recycling: draft a tree from what the model last thought likely after each token.

A matrix M holds, for every token of the vocabulary, the k tokens that were likeliest after it when it was last run
through the model, rejected drafts included. The draft is a fixed, lopsided tree of 80 places in six levels: a place
says "the r-th candidate of my parent's token", so a whole level is read from M at once, starting at the last known
token. Every forward pass overwrites the rows of the tokens that were in it; M outlives requests.

    M[x_i] = argtopk p(. | x_1 ... x_i)          tree: x(child r of node) = M[x(node), r]

Luo et al. 2024, arXiv:2408.08696, sections 3.1 to 3.3; the tree is that of Luowaterbi/TokenRecycling, version 2.2.2;
k V numbers of 4 bytes (2 where V <= 65536): 0.5 MB for 32,000 tokens, 4 MB for 128,000. Departures: a token
that was never seen has no candidates (the paper has token 0 there), so early trees are smaller; with less budget than
80 nodes, those are kept whose product of `hit`^depth / (1 + rank) along the path is largest; where a token is
in a step twice its last row counts (the paper's Figure 3c finds that best, and slow on its GPUs); prompt tokens
teach M only with `prompts` on; `nodes` is smaller by default than the paper's tree, because a processor core is not
free for many tokens as a GPU is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from modicum.serve.drafters import EMPTY, Drafter, Tree

CLAIM = {
    "figure": "2.7 tokens per forward and 2.0 times faster on SpecBench, 2.9 and 2.3 on MBPP; under 2 MB",
    "where": "Table 1",
    "scale": "7B parameters, one A100, greedy, batch of one",
}
SWEEP = {"nodes": (16,)}

# Children of every node, level by level in the order of the nodes; a node left out at the end has none.
CHILDREN = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1),
    (2, 0, 0, 1),
)
HIT = 0.6  # how likely the best candidate is thought to be, where the tree must be cut


@dataclass(frozen=True, kw_only=True)
class Config:
    k: int = 8  # candidates kept per token
    nodes: int = 16  # of the tree's 80
    prompts: bool = True  # learn from prompts as well: the output layer runs on their tokens

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 64:
            raise ValueError(f"k={self.k} must be 1 to 64")
        if self.nodes < 1:
            raise ValueError(f"nodes={self.nodes} must be at least 1 (the tree has 80)")


@dataclass(frozen=True, slots=True)
class Template:
    """Places of a tree: parents, ranks among the parent's candidates, and where each level begins."""

    parents_N: np.ndarray
    ranks_N: np.ndarray
    levels: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=256)
def template(nodes: int, k: int) -> Template:
    """The `nodes` most promising places of the tree that need no more than `k` candidates."""
    parents, ranks, depths, logs = [-1], [0], [0], [0.0]
    level = [0]
    for children in CHILDREN:
        below = []
        for node, count in zip(level, children, strict=False):
            for rank in range(count):
                parents.append(node)
                ranks.append(rank)
                depths.append(depths[node] + 1)
                logs.append(logs[node] + float(np.log(HIT / (1 + rank))) if rank < k else -np.inf)
                below.append(len(parents) - 1)
        level = below
    best = sorted(range(1, len(parents)), key=lambda i: (-logs[i], i))[:nodes]
    kept = sorted(i for i in best if logs[i] > -np.inf)  # a parent is likelier than its child: never cut before it
    new_index = {0: -1} | {old: new for new, old in enumerate(kept)}
    depth = [depths[i] for i in kept]
    levels = [(depth.index(d), depth.index(d) + depth.count(d)) for d in sorted(set(depth))]
    return Template(
        np.array([new_index[parents[i]] for i in kept], dtype=np.int64),
        np.array([ranks[i] for i in kept], dtype=np.int64),
        tuple(levels),
    )


class TokenRecycling(Drafter):
    config: Config

    def __init__(self, config: Config, vocab_size: int):
        super().__init__(config, vocab_size)
        self.learns = "all" if config.prompts else "drawn"
        self.k = min(config.k, vocab_size)
        self.next_VK = np.zeros((vocab_size, self.k), dtype=np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self.known_V = np.zeros(vocab_size, dtype=bool)

    def propose(self, tokens: Sequence[int], budget: int) -> Tree:
        nodes = min(self.config.nodes, budget)
        if nodes <= 0 or not self.known_V[tokens[-1]]:
            return EMPTY
        t = template(nodes, self.k)
        tokens_N = np.empty(len(t.ranks_N), dtype=np.int64)
        alive_N = np.empty(len(t.ranks_N), dtype=bool)
        first, last = t.levels[0]
        tokens_N[first:last] = self.next_VK[tokens[-1], t.ranks_N[first:last]]
        alive_N[first:last] = True
        for first, last in t.levels[1:]:
            parents = t.parents_N[first:last]
            tokens_N[first:last] = self.next_VK[tokens_N[parents], t.ranks_N[first:last]]
            alive_N[first:last] = alive_N[parents] & self.known_V[tokens_N[parents]]
        if alive_N.all():
            return Tree(tokens_N, t.parents_N)
        new_index_N = np.append(alive_N.cumsum() - 1, -1)  # the last: the root stays -1
        return Tree(tokens_N[alive_N], new_index_N[t.parents_N[alive_N]])

    def observe(self, tokens_T: Tensor, logits_TV: Tensor) -> None:
        best_TK = logits_TV.topk(self.k).indices.cpu().numpy()
        tokens = tokens_T.cpu().numpy()
        self.next_VK[tokens] = best_TK  # of equal tokens the last one stays
        self.known_V[tokens] = True

    def nbytes(self) -> int:
        return self.next_VK.nbytes + self.known_V.nbytes
