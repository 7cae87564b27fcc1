"""window: a language model orders a window of candidates that slides from the last to the first.

    for s = C - size, C - size - step, ..., 0:    d_s ... d_(s + size) = order(q, d_s ... d_(s + size))

A good passage at the end rises with the overlap of the windows, so one pass settles the first `size - step`
passages and no more; `passes` repeats it. Sun et al. 2023, arXiv:2304.09542 (RankGPT), section 3.2; window 20 and step
10 are theirs. A reply need not be a permutation: numbers that it lacks follow in their old order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from modicum.retrieve.rerankers import Reranker


@dataclass(frozen=True, kw_only=True)
class Config:
    size: Annotated[int, Field(ge=2)] = 20  # passages of a window
    step: Annotated[int, Field(ge=1)] = 10
    passes: Annotated[int, Field(ge=1)] = 1
    depth: Annotated[int, Field(ge=1)] = 100  # candidates that are looked at

    def __post_init__(self) -> None:
        if self.step > self.size:
            raise ValueError(f"step={self.step} leaves passages between windows of size={self.size}; at most the size")


class Window(Reranker):
    config: Config

    def rank(self, query: str, rows_C: np.ndarray, k: int) -> np.ndarray:
        rows, rest = rows_C[: self.config.depth].copy(), rows_C[self.config.depth :]
        for _ in range(self.config.passes):
            self.slide(query, rows, 0)
        return np.concatenate([rows, rest])[:k]

    def slide(self, query: str, rows_C: np.ndarray, settled: int) -> None:
        """One pass over rows_C in its memory, leaving the first `settled` as they are."""
        start = max(len(rows_C) - self.config.size, settled)
        while len(rows_C) > settled:
            part = slice(start, start + self.config.size)
            reply = self.scorer.order(query, rows_C[part].tolist())
            rows_C[part] = rows_C[part][permutation(reply, len(rows_C[part]))]
            if start == settled:
                break
            start = max(start - self.config.step, settled)


def permutation(reply: str, count: int) -> list[int]:
    """Positions from 0 in the order of a reply such as "[2] > [1]": numbers out of range and repeated ones are
    dropped, missing ones follow in their old order. Always a permutation."""
    named = [int(n) - 1 for n in re.findall(r"\d{1,9}", reply)]
    order = list(dict.fromkeys(i for i in named if 0 <= i < count))
    return order + [i for i in range(count) if i not in set(order)]
