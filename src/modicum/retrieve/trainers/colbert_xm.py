"""colbert-xm: late interaction trained in one language, and searched in others by their adapters.

The encoder is modular (`retrieve.languages`): weights in common, and adapters of each language in every layer, chosen
by the language of each text. Retrieval is trained on one language with its adapters active; adapters of all languages
and the word embeddings stay frozen, the weights in common learn. With token vectors of length 1,

    s(q, d) = sum over query tokens of max over passage tokens of <q_t, d_s>
    L = -ln softmax of s(q, own passage) against (own, its negative) - the same against all passages of the batch

Queries are filled with mask tokens to `query_tokens`, which attend; punctuation of documents is not compared. Retriever
`colbert-xm` searches what is trained. `adapters` is a folder of `languages.save`, pretrained on the languages to come;
without it the adapters of `languages` are fresh and change nothing.

Louis et al. 2024 (COLING 2025), arXiv:2402.15059, with the authors' training script (losses of ColBERTv1.5). The scheme
of freezing is X-MOD's. Departs: the encoder is a small one pretrained here, where the paper's rests on 75 languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.files import write_json
from modicum.retrieve import languages
from modicum.retrieve.indexes import Hits
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch, RetrieverTrainer


@dataclass(frozen=True, kw_only=True)
class Config:
    adapters: str = ""  # a folder of languages.save, whose encoder is the one that is trained; "": fresh ones
    languages: tuple[str, ...] = ("en",)  # of fresh adapters
    language: str = "en"  # of the training texts
    rank: Annotated[int, Field(ge=1)] = 16  # bottleneck of fresh adapters
    dims: Annotated[int, Field(ge=1)] = 128  # of token vectors
    query_tokens: Annotated[int, Field(ge=4)] = 32
    scale: Annotated[float, Field(gt=0)] = 1.0  # of scores in both softmaxes


TOY = Config(dims=16, query_tokens=12)


class ColbertXM(RetrieverTrainer):
    config: Config
    kind = "late"

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.adapters: languages.LanguageAdapters | None = None
        self._student: Student | None = None

    def prepare(self, student: Student) -> None:
        c = self.config
        if self._student is student:
            return
        if c.adapters:
            self.adapters = languages.adapters_of(Path(c.adapters))
        else:
            self.adapters = languages.LanguageAdapters(student.width, student.depth, c.rank, c.languages)
        if c.language not in self.adapters.languages:
            raise UserError(f"no adapters of {c.language!r}; there are those of {', '.join(self.adapters.languages)}")
        self.adapters.requires_grad_(False).attach(student.model)
        student.model.embeddings.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.heads = nn.ModuleDict({"late": languages.LateHead(student.width, c.dims, c.query_tokens)})
        self._student = student

    @property
    def late(self) -> Any:
        assert self.heads is not None
        heads: Any = self.heads
        return heads["late"]

    def loss(self, student: Student, batch: Batch) -> Tensor:
        assert self.adapters is not None
        count, texts = len(batch.query_B), self.texts(batch)
        with self.adapters.speaking([self.config.language] * count):
            queries = self.late(student, texts[:count], query=True)
        with self.adapters.speaking([self.config.language] * (2 * count)):
            passages = self.late(student, texts[count:], query=False)
        return self.on_scores(languages.max_sims(*queries, *passages), batch)

    def on_scores(self, scores_BP: Tensor, batch: Batch) -> Tensor:
        """Columns are B own passages, then B negatives."""
        scores_BP = self.config.scale * scores_BP
        count = len(scores_BP)
        at_B = torch.arange(count, device=scores_BP.device)
        own_B2 = torch.stack([scores_BP[at_B, at_B], scores_BP[at_B, count + at_B]], 1)
        rows_P = np.concatenate([batch.positive_B, batch.negative_B])
        again_BP = rows_P[None] == batch.positive_B[:, None]  # the passage itself is no negative of its query
        np.fill_diagonal(again_BP, False)
        all_BP = scores_BP.masked_fill(torch.from_numpy(again_BP).to(scores_BP.device), -torch.inf)
        return F.cross_entropy(own_B2, torch.zeros_like(at_B)) + F.cross_entropy(all_BP, at_B)

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        """From one vector for a text: texts of one token."""
        passages_PD = torch.cat([positives_BD, negatives_BD])
        return self.on_scores(F.normalize(queries_BD, dim=-1) @ F.normalize(passages_PD, dim=-1).T, batch)

    def ranking(self, student: Student, passages: Sequence[str], queries: Sequence[str], k: int) -> tuple[Hits, float]:
        from modicum.retrieve.retrievers.colbert_xm import ColbertXMStore

        assert self.adapters is not None
        store = ColbertXMStore.of(student, self.adapters, self.late)
        store.build(passages)
        return store.rank(queries, k), store.nbytes() / max(len(passages), 1)

    def settle(self, student: Student, folder: Path) -> None:
        from safetensors.torch import save_file

        assert self.adapters is not None
        languages.save(folder, student, self.adapters)
        save_file({n: p.detach().contiguous() for n, p in self.late.state_dict().items()}, folder / "late.safetensors")
        write_json(folder / "colbert-xm.json", {"dims": self.config.dims, "query_tokens": self.config.query_tokens})
