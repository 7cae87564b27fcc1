"""xbt: a projection, learnt from texts alone, by which a new encoder searches the index of an old one.

    phi(x) = unit(W x + U tanh(V x))        W begins as the orthogonal Procrustes solution, U at 0
    first `steps`:  L = mean (1 - cos(phi(new(t)), old(t)))        over queries' texts t, no passage is seen
    then:           L = InfoNCE of phi(new(query)) with old(passage) of the batch        few pairs are enough

The gallery keeps its old vectors; the new encoder is not changed, and the old one is not needed afterwards. The aim is
that new queries on old vectors beat old queries on old vectors; `compatible.negative_flips` counts queries that were
right and became wrong. Encoder `xbt` opens what is left and encodes into the old space.

Jang and Lim 2025 (ICCV), arXiv:2405.14715, stages 1 and 2 by the abstract; the form of both losses, and the start from
Procrustes, are choices made here. Departs: two kinds of text (queries, passages) in the place of captions and images;
in the second stage phi alone is trained, where the authors also tune light parameters of the new model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.core.files import write_json
from modicum.retrieve.compatible import Projection, procrustes
from modicum.retrieve.encoders import Encoder, make_encoder, unit
from modicum.retrieve.indexes import Hits, top_rows
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch, RetrieverTrainer

NOT_MEASURABLE = (
    "it joins two encoders; the other trainers learn one from the same raw start, which is what the bench compares"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    old: str = "minilm"  # encoder of the index that stays: KEY:knob=value or a model
    hidden: Annotated[int, Field(ge=1)] = 256  # of the projection
    start: Literal["procrustes", "random"] = "procrustes"  # of W
    steps: Annotated[int, Field(ge=0)] | None = None  # of texts alone, before pairs; None: all
    temperature: Annotated[float, Field(gt=0)] = 0.05  # of the second stage


TOY = Config(old="lsa:dims=16", hidden=16, start="random")


class XBT(RetrieverTrainer):
    config: Config
    unit = True

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.old: Encoder | None = None
        self.old_queries_QE = self.old_passages_PE = np.empty((0, 0), np.float32)

    def prepare(self, student: Student) -> None:
        """Old vectors of all texts, and the closed-form start from the queries' alone."""
        student.requires_grad_(False)
        if self.old is None:
            self.old = make_encoder(self.config.old)
            self.old.count(self.pairs.passages)
            self.old.fit([self.old.pool(self.pairs.passages)])
            self.old_queries_QE = unit(self.old.encode_queries(self.pairs.queries))
            self.old_passages_PE = unit(self.old.encode(self.pairs.passages))
        new_QD = unit(student.encode(self.pairs.queries))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.heads = Projection(student.width, self.old_queries_QE.shape[1], self.config.hidden)
        if self.config.start == "procrustes":
            self.phi.begin(procrustes(new_QD, self.old_queries_QE))

    @property
    def phi(self) -> Projection:
        assert isinstance(self.heads, Projection)
        return self.heads

    def loss(self, student: Student, batch: Batch) -> Tensor:
        with torch.no_grad():
            new_BD = student([self.pairs.queries[q] for q in batch.query_B]).pooled()
        projected_BE = self.phi(new_BD)
        if self.config.steps is None or batch.step < self.config.steps:
            old_BE = torch.from_numpy(self.old_queries_QE[batch.query_B])
            return (1 - (projected_BE * old_BE).sum(-1)).mean()
        old_PE = torch.from_numpy(self.old_passages_PE)
        return self.on_vectors(projected_BE, old_PE[batch.positive_B], old_PE[batch.negative_B], batch)

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        """From projected queries and old vectors of passages."""
        logits_BP = queries_BD @ torch.cat([positives_BD, negatives_BD]).T / self.config.temperature
        rows_P = np.concatenate([batch.positive_B, batch.negative_B])
        again_BP = rows_P[None] == batch.positive_B[:, None]  # the passage itself is no negative of its query
        np.fill_diagonal(again_BP, False)
        logits_BP = logits_BP.masked_fill(torch.from_numpy(again_BP), -torch.inf)
        return F.cross_entropy(logits_BP, torch.arange(len(queries_BD)))

    def project(self, student: Student, texts: Sequence[str]) -> np.ndarray:
        """Vectors of new encoder and projection, in the old space."""
        with torch.inference_mode():
            vectors: np.ndarray = self.phi(torch.from_numpy(student.encode(texts))).numpy()
        return vectors

    def ranking(self, student: Student, passages: Sequence[str], queries: Sequence[str], k: int) -> tuple[Hits, float]:
        """New queries on old vectors."""
        assert self.old is not None
        gallery_PE = unit(self.old.encode(passages))
        rows_QK, scores_QK = top_rows(self.project(student, queries), gallery_PE, k)
        return Hits(rows_QK, scores_QK), float(gallery_PE.nbytes) / max(len(passages), 1)

    def settle(self, student: Student, folder: Path) -> None:
        from safetensors.torch import save_file

        student.save(folder)
        save_file({n: p.detach().contiguous() for n, p in self.phi.state_dict().items()}, folder / "phi.safetensors")
        shape = {"new": student.width, "old": self.old_queries_QE.shape[1], "hidden": self.config.hidden}
        write_json(folder / "xbt.json", shape)
