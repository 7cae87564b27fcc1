"""long-context-rag: the best passages at both ends of the prompt, the worst in the middle.

    rank i odd  -> position (i + 1) / 2        rank i even -> position k + 1 - i / 2

because models overlook the middle of a long prompt, where hard negatives (high-ranked passages without the answer)
then do least harm. Jin et al. 2024, arXiv:2410.05983 (ICLR 2025), section 4. Training-free; `tuning_pairs` makes
the data of their implicit robustness tuning (section 5.1): questions with k retrieved passages, hard negatives
included, in prompts as this reader lays them out, and the answer alone to learn. Their tuning with written
rationales needs a stronger model and is left out. Departs: passages keep the length that the budget
gives to their rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modicum.retrieve.readers import Reader
from modicum.retrieve.search import Hit


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class BothEnds(Reader):
    config: Config

    def order(self, count: int) -> list[int]:
        position_of = [i // 2 if i % 2 == 0 else count - 1 - i // 2 for i in range(count)]
        return [rank for _, rank in sorted(zip(position_of, range(count), strict=True))]


def tuning_pairs(
    reader: Reader,
    questions: Sequence[tuple[str, str, str]],
    search: Callable[[str, int], Sequence[Hit]],
    *,
    ks: Sequence[int] = (2, 4, 8),
    budget_per_passage: int = 160,
    count: Callable[[str], int],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Chats with answers from (question, answer, id of the gold passage): {"messages", "gold", "k"}.

    k varies from `ks`. "gold": whether the gold passage is in the prompt; the others that `search` ranks high are the
    hard negatives. Loss belongs on the last message alone, which is what `modicum adapt` puts it on.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for question, answer, gold in questions:
        k = int(rng.choice(list(ks)))
        hits = [replace(h) for h in search(question, k)][:k]
        messages, sources, _ = reader.compose(question, hits, 60 + budget_per_passage * k, count)
        messages = [*messages, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "gold": any(s.id == gold for s in sources), "k": len(sources)})
    return rows
