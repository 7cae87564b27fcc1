"""demo-retrieval-meta: questions learn which demonstrations make the answer likely, summed over all of them.

A bank holds labelled examples of many tasks, as text; of a question x the K candidates z have p(z|x), a softmax of the
encoder's scores, and ln p(y|x, z), a language model's feedback (`retrieve.feedback`):

    L = - ln sum over z of p(z|x) p(y|x, z) = - logsumexp over z of ( ln p(z|x) + ln p(y|x, z) )

Probabilities are added up, not losses. Vectors of the bank are those of the encoder as it began; only the question's
side is trained. `demonstrations` makes the other half: chats in which each example stands with retrieved ones and their
answers, for meta-training the reader with `modicum adapt`, and again at test time. An example and its equals are never
their own demonstration, and a bank that holds a test item is refused.

Mueller et al. 2023 (Findings of ACL), arXiv:2307.00119; the marginal likelihood is that of retrieval-augmented
generation (Lewis et al. 2020, arXiv:2005.11401). Departs: a frozen decoder's likelihoods stand for the reader that is
trained jointly; with k demonstrations in one prompt (`demonstrations`) nothing is marginalised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.retrieve.encoders import unit
from modicum.retrieve.indexes import Hits, top_rows
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch
from modicum.retrieve.trainers._candidates import CandidateTrainer as _CandidateTrainer


@dataclass(frozen=True, kw_only=True)
class Config:
    candidates: Annotated[int, Field(ge=2)] = 5  # demonstrations that are summed over
    scale: Annotated[float, Field(gt=0)] = 20.0  # of cosines, in p(z|x)


class DemoRetrieval(_CandidateTrainer):
    config: Config
    needs = frozenset({"scores"})
    unit = True

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.bank: Student | None = None
        self._student: Student | None = None

    def prepare(self, student: Student) -> None:
        if self._student is not student:
            self.bank, self._student = copy.deepcopy(student).eval().requires_grad_(False), student

    def loss(self, student: Student, batch: Batch) -> Tensor:
        assert self.bank is not None
        rows_BK = self.candidates(batch)
        real_BK = torch.from_numpy(rows_BK >= 0)
        queries_BD = student(self.query_texts(batch)).pooled()
        with torch.no_grad():
            keys_ND = self.bank(self.key_texts(rows_BK[rows_BK >= 0].tolist(), batch)).pooled()
        keys_BKD = keys_ND.new_zeros((*rows_BK.shape, keys_ND.shape[-1]))
        keys_BKD[real_BK.to(keys_ND.device)] = keys_ND
        return self.on_candidates(queries_BD, keys_BKD, self.rewards(batch, rows_BK).to(keys_ND.device))

    def on_candidates(self, queries_BD: Tensor, keys_BKD: Tensor, rewards_BK: Tensor) -> Tensor:
        cosine_BK = (F.normalize(queries_BD, dim=-1)[:, None] * F.normalize(keys_BKD, dim=-1)).sum(-1)
        missing_BK = rewards_BK == -torch.inf
        prior_BK = (self.config.scale * cosine_BK).masked_fill(missing_BK, -torch.inf).log_softmax(1)
        joint_BK = prior_BK + rewards_BK.to(prior_BK.dtype)
        return -joint_BK.masked_fill(missing_BK, -torch.inf).logsumexp(1).mean()

    def ranking(self, student: Student, passages: Sequence[str], queries: Sequence[str], k: int) -> tuple[Hits, float]:
        """Questions by the trained encoder, the bank by the one that it began as."""
        assert self.bank is not None
        bank_PD = unit(self.bank.encode(passages))
        rows_QK, scores_QK = top_rows(unit(student.encode(queries)), bank_PD, k)
        return Hits(rows_QK, scores_QK), float(bank_PD.nbytes) / max(len(passages), 1)

    def settle(self, student: Student, folder: Path) -> None:
        """The question encoder, and in `bank` the one that encodes demonstrations."""
        assert self.bank is not None
        student.save(folder)
        self.bank.save(folder / "bank")


@dataclass(frozen=True)
class Labelled:
    """An example of a task: what is given, and the answer."""

    task: str
    text: str
    answer: str

    def shown(self) -> str:
        return f"{self.text}\nAnswer: {self.answer}"


def demonstrations(
    items: Sequence[Labelled],
    bank: Sequence[Labelled],
    rank: Callable[[list[str], int], Hits],
    k: int = 5,
    *,
    testing: bool = False,
) -> list[dict[str, Any]]:
    """Chats {"messages", "demonstrations"}: k examples of the bank with answers, most similar last, then the item.

    rank: rows of the bank for texts. What equals the item is left out; with `testing` a bank that holds an item is
    refused instead, because its label would be read off. Chats for training end with the answer.
    """
    own = {_normal(b.text) for b in bank}
    leaks = [i for i in items if testing and _normal(i.text) in own]
    if leaks:
        raise UserError(
            f"the bank holds {len(leaks)} test items, the first {leaks[0].text[:40]!r}; leave them out of it"
        )
    chats = []
    hits = rank([i.text for i in items], k + 8)
    for item, rows in zip(items, hits.ids_QK, strict=True):
        used = [int(r) for r in rows if r >= 0 and _normal(bank[r].text) != _normal(item.text)][:k]
        shown = "\n\n".join(bank[r].shown() for r in used[::-1])
        messages = [
            {"role": "user", "content": f"{shown}\n\n{item.text}\nAnswer:" if used else f"{item.text}\nAnswer:"}
        ]
        if not testing:
            messages.append({"role": "assistant", "content": item.answer})
        chats.append({"messages": messages, "demonstrations": used})
    return chats


def _normal(text: str) -> str:
    return " ".join(text.lower().split())
