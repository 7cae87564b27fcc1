"""full-ranking: a language model orders all candidates in one reply.

One prompt holds all passages `[1] ... [n]` and the reply is their order, so each is read once, where windows read most
twice. Only a model trained for it can: on complete orders, made by a teacher that sees windows. A pass of windows
settles its first `size - step` passages alone, so `complete_order` repeats passes over what is not settled. The
training loss weights the tokens of the number at rank r (from 1), and separators by 1:

    L = sum over label tokens of w NLL / number of label tokens        w = 1 + 1 / log2(r + 1)

Liu et al. 2024, arXiv:2412.14574, section 4 (importance-aware loss, multi-pass sliding windows). `label` and
`label_weights` make the training text and w for any causal model's tokenizer. Departs: ranks advance where the text of
the label does, not at one tokenizer's separator token; a training rank's weight covers the brackets that the tokenizer
merges with the number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.retrieve.rerankers import Reranker
from modicum.retrieve.rerankers.window import Window as _Window
from modicum.retrieve.rerankers.window import permutation


@dataclass(frozen=True, kw_only=True)
class Config:
    depth: Annotated[int, Field(ge=1)] = 100  # candidates in the prompt


class FullRanking(Reranker):
    config: Config

    def rank(self, query: str, rows_C: np.ndarray, k: int) -> np.ndarray:
        rows, rest = rows_C[: self.config.depth], rows_C[self.config.depth :]
        if len(rows) > 1:
            rows = rows[permutation(self.scorer.order(query, rows.tolist()), len(rows))]
        return np.concatenate([rows, rest])[:k]


def prompt(query: str, passages: Sequence[str]) -> str:
    """The user's message; the reply is `label` of an order."""
    shown = "\n".join(f"[{n}] {' '.join(text.split())}" for n, text in enumerate(passages, 1))
    return (
        f"{shown}\n\nQuery: {query}\nOrder all {len(passages)} passages by relevance to the query, most relevant "
        "first, as [2] > [1]. Answer with the order alone."
    )


def label(order: Sequence[int]) -> str:
    """ "[3] > [1] > [2]" for positions 2, 0, 1."""
    return " > ".join(f"[{i + 1}]" for i in order)


def label_weights(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """w_T of a label's tokens, given by the characters that each covers."""
    weights_T = np.ones(len(offsets))
    for rank, match in enumerate(re.finditer(r"\d+", text), 1):
        for t, (start, end) in enumerate(offsets):
            if start < match.end() and end > match.start():
                weights_T[t] = 1 + 1 / np.log2(rank + 1)
    return weights_T


def importance_loss(logits_TV: Any, targets_T: Any, weights_T: Any) -> Any:
    """The loss of one label: weighted sum over its tokens, divided by their number (not by the sum of weights)."""
    from torch.nn import functional as F

    return (F.cross_entropy(logits_TV, targets_T, reduction="none") * weights_T).sum() / len(targets_T)


def complete_order(
    query: str, rows_C: np.ndarray, teacher: _Window, report: Callable[[int], None] = lambda settled: None
) -> np.ndarray:
    """A complete order by a teacher that orders windows: each pass settles the next `size - step` passages."""
    rows, settled = rows_C.copy(), 0
    fresh = teacher.config.size - teacher.config.step
    while settled < len(rows):
        teacher.slide(query, rows, settled)
        settled += max(fresh, 1) if settled + teacher.config.size < len(rows) else len(rows)
        report(min(settled, len(rows)))
    return rows
