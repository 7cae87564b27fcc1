"""port drafter: which tokens may come next, guessed cheaply, for the model to check many in one forward pass.

A method guesses a tree of tokens below the last known one. The engine runs the whole tree through the model in
the step that computes that token, draws the next token as it always does, and goes on along the tree for as
long as what was drawn is in it (`serve.verify`). So a guess costs or saves time and never changes an output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from modicum.core.registry import Method

BASELINE = "none"


@dataclass(frozen=True, slots=True)
class Tree:
    """N drafted tokens. Node i follows node parents_N[i] < i, or the last known token if that is -1.

    The nodes that follow one node have different tokens.
    """

    tokens_N: np.ndarray  # int64
    parents_N: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.tokens_N)

    def first(self, n: int) -> Tree:
        """The first `n` nodes: a tree again, because parents come first."""
        return self if n >= len(self) else Tree(self.tokens_N[: max(0, n)], self.parents_N[: max(0, n)])


def chain(tokens: Sequence[int] | np.ndarray) -> Tree:
    """A tree of one branch."""
    return Tree(np.asarray(tokens, dtype=np.int64), np.arange(-1, len(tokens) - 1, dtype=np.int64))


EMPTY = chain(())


@dataclass(frozen=True, slots=True)
class Layout:
    """Of a tree with the last known token as place 0, X = 1 + N places in all.

    depth_X; sees_XX: which places are ancestors of each, or itself; line_XD: the same as places, from depth 1 down
    to its own, then zeros.
    """

    depth_X: np.ndarray
    sees_XX: np.ndarray
    line_XD: np.ndarray


def layout(tree: Tree) -> Layout:
    return _layout(np.ascontiguousarray(tree.parents_N, dtype=np.int64).tobytes())


@functools.lru_cache(maxsize=512)
def _layout(parents: bytes) -> Layout:
    parents_N = np.frombuffer(parents, dtype=np.int64)
    depth_X = np.zeros(len(parents_N) + 1, dtype=np.int64)
    sees_XX = np.eye(len(parents_N) + 1, dtype=bool)
    for i, parent in enumerate(parents_N.tolist(), 1):
        depth_X[i] = depth_X[parent + 1] + 1
        sees_XX[i] |= sees_XX[parent + 1]
    line_XD = np.zeros((len(depth_X), int(depth_X.max())), dtype=np.int64)
    for i, depth in enumerate(depth_X.tolist()):
        line_XD[i, :depth] = np.flatnonzero(sees_XX[i])[1:]
    return Layout(depth_X, sees_XX, line_XD)


class Drafter(Method):
    """Base of the methods, constructed once per engine as `cls(config, vocab_size)`.

    `drafts` False says that `propose` never gives anything, and spares the question. `learns` says whose
    logits `observe` is to see: nobody's, those that are computed anyway ("drawn": of sequences that go on, their
    drafts included), or those of prompt tokens too ("all": the output layer then runs on whole prompts).
    """

    drafts: ClassVar[bool] = True
    learns: Literal["nothing", "drawn", "all"] = "nothing"

    def __init__(self, config: Any, vocab_size: int):
        self.config, self.vocab_size = config, vocab_size

    def begin(self, prompt: Sequence[int]) -> Drafter:
        """The drafter of one sequence: itself, or a copy with state of its own beside what is shared."""
        return self

    def propose(self, tokens: Sequence[int], budget: int) -> Tree:
        """At most `budget` nodes below the last of `tokens`, all that is known of the sequence.

        `tokens` starts with what the last call was given. Early nodes should be the likely ones: the engine may
        cut the tree from its end.
        """
        raise NotImplementedError

    def observe(self, tokens_T: Tensor, logits_TV: Tensor) -> None:
        """Tokens of a step (any sequences', in order) and what the model says comes after each."""

    def nbytes(self) -> int:
        """Bytes of what all sequences share."""
        return 0
