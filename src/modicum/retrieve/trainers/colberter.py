"""colberter: one vector for the text and small gated vectors for its unique words, trained together.

From the states H of one encoder: c = W_c H_first for retrieval, and W_t H compressed before anything is added up. A
word's vector is the mean over all sub-words of all its occurrences; documents' words pass a gate and those it closes
are not stored; a second compression to one dimension makes matching exact (`last=1,exact=true`):

    g = ReLU(w v + 1)    v <- g v        s = sigma(gamma) c_q c_d + (1 - sigma(gamma)) sum over words of q max_d <q, d>
    L = margin-mse(s) + margin-mse(c_q c_d) + sparsity mean(g)

No vector is scaled to length 1: lengths carry importance. What is trained is searched by retriever `colberter`.

Hofstätter et al. 2022, arXiv:2203.13088, sections 3 and 4, with the authors' model code. Departs: in training one
negative for each query as in margin-mse (no second teacher in the batch); sparsity from the first step, its weight
growing linearly, where the authors train in stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from modicum.core.files import write_json
from modicum.retrieve.indexes import Hits
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch
from modicum.retrieve.trainers.margin_mse import Config as MarginConfig
from modicum.retrieve.trainers.margin_mse import MarginMSE as _MarginMSE
from modicum.retrieve.wordwise import WordHeads

RISE = 100  # steps over which the weight of sparsity grows


@dataclass(frozen=True, kw_only=True)
class Config(MarginConfig):
    whole: Annotated[int, Field(ge=1)] = 128  # dimensions of the text's vector
    words: Annotated[int, Field(ge=1)] = 32  # of a word's vector
    last: Annotated[int, Field(ge=1)] | None = None  # of a word's vector after the second compression
    exact: bool = False  # only equal words match
    gates: bool = True  # contextual stop words
    sparsity: Annotated[float, Field(ge=0)] = 0.1  # weight of the mean gate

    def __post_init__(self) -> None:
        if self.cosine:
            raise ValueError("cosine: word vectors keep their lengths, which say what is important; leave it out")
        if self.last == 1 and not self.exact:
            raise ValueError("last=1 keeps one number of a word, which matches any other; add exact=true")


TOY = Config(whole=16, words=8, sparsity=0.01)


class ColBERTer(_MarginMSE):
    config: Config
    kind = "late"

    def __init__(self, config: Any, pairs: Any):
        super().__init__(config, pairs)
        self._width = 0

    def prepare(self, student: Student) -> None:
        c = self.config
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.heads = WordHeads(student.width, c.whole, c.words, c.last, c.gates)
        with torch.no_grad():  # inner products of the order of margin-mse's
            for linear in (self.heads.whole, self.heads.words):
                linear.weight.mul_(3**0.5 * student.width**-0.25)

    def loss(self, student: Student, batch: Batch) -> Tensor:
        count = len(batch.query_B)
        texts = self.texts(batch)
        assert isinstance(self.heads, WordHeads)
        queries = self.heads(student(texts[:count]), document=False)
        positives = self.heads(student(texts[count : 2 * count]), document=True)
        negatives = self.heads(student(texts[2 * count :]), document=True)
        above = self.heads.score(queries, positives, exact=self.config.exact)
        below = self.heads.score(queries, negatives, exact=self.config.exact)
        taught_B = torch.as_tensor(self.margins(batch), dtype=above[0].dtype, device=above[0].device)
        total = sum(((a - b - taught_B).pow(2).mean() for a, b in zip(above, below, strict=True)), torch.zeros(()))
        if self.config.gates and self.config.sparsity:
            gates = [(d.gate_NW.sum(-1) / d.mask_NW.sum(-1).clamp(min=1)).mean() for d in (positives, negatives)]
            total = total + self.config.sparsity * min(1.0, (batch.step + 1) / RISE) * sum(gates, torch.zeros(()))
        return total

    def ranking(self, student: Student, passages: Sequence[str], queries: Sequence[str], k: int) -> tuple[Hits, float]:
        from modicum.retrieve.retrievers.colberter import ColBERTerStore

        assert isinstance(self.heads, WordHeads)
        store = ColBERTerStore.of(student, self.heads, exact=self.config.exact)
        store.build(passages)
        return store.rank(queries, k), store.nbytes() / max(len(passages), 1)

    def settle(self, student: Student, folder: Path) -> None:
        from safetensors.torch import save_file

        student.save(folder)
        assert self.heads is not None
        save_file(
            {n: p.detach().contiguous() for n, p in self.heads.state_dict().items()}, folder / "heads.safetensors"
        )
        names = ("whole", "words", "last", "exact", "gates")
        write_json(folder / "colberter.json", {n: getattr(self.config, n) for n in names})
