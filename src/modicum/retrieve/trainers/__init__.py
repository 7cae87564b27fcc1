"""port trainer: how an encoder learns to retrieve: the texts of a batch, and the loss on their vectors.

Shape letters: B queries of a batch, D width of vectors.

A method is constructed as `cls(config, pairs)` and used by `retrieve.training.train`: `prepare` once (clusters, what
is mined), then for every step `batch`, which depends on (seed, step) alone so that a run resumes exactly, and `loss`.
Trainers start from a raw encoder (`student.Student`) and leave a folder that any encoder port opens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.core.registry import Method
from modicum.retrieve.encoders import unit
from modicum.retrieve.indexes import Hits, top_rows
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student

BASELINE = "in-batch"


@dataclass(frozen=True)
class Batch:
    """Rows of B queries, of the passage each one is about, and of a negative for each."""

    query_B: np.ndarray
    positive_B: np.ndarray
    negative_B: np.ndarray
    seed: int = 0
    step: int = 0

    @property
    def rng(self) -> np.random.Generator:
        """For what else a loss draws."""
        return np.random.default_rng([self.seed, self.step, 1])


class RetrieverTrainer(Method):
    """Base class. A method defines `on_vectors`, and `batch`, `prepare` or `loss` where they differ.

    needs: what `pairs` must hold: "scores" (of a teacher), "late" (scores within a batch). kind: "dense", one vector
    for a text, or "late", one for each word. heads: parameters beside the encoder's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    kind: ClassVar[str] = "dense"
    unit: bool = False  # whether vectors are compared at length 1

    def __init__(self, config: Any, pairs: Pairs):
        self.config, self.pairs = config, pairs
        self.heads: nn.Module | None = None
        if not len(pairs.negatives_Q):
            raise UserError("the pairs have no negatives; make them with pairs.with_negatives")
        if "scores" in self.needs and not any(len(s) > 1 for s in pairs.scores_Q):
            raise UserError(f"{type(self).__name__} learns from a teacher; score the pairs with pairs.with_scores")
        if "late" in self.needs and pairs.late is None:
            raise UserError(f"{type(self).__name__} learns from a late-interaction teacher; give pairs with late=")

    def prepare(self, student: Student) -> None:
        """What is done once before the first step, from the pairs and the raw encoder; deterministic."""

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Queries in an order of their own for every epoch, each with one of its negatives."""
        count = len(self.pairs.queries)
        size = min(size, count)
        per_epoch = count // size
        epoch, part = divmod(step, per_epoch)
        query_B = np.random.default_rng([seed, epoch]).permutation(count)[part * size : (part + 1) * size]
        rng = np.random.default_rng([seed, step])
        return self.drawn(query_B, [int(rng.choice(self.pairs.negatives_Q[q])) for q in query_B], seed, step)

    def drawn(self, query_B: Any, negative_B: Any, seed: int, step: int) -> Batch:
        query_B = np.asarray(query_B, np.int64)
        return Batch(query_B, self.pairs.positive_Q[query_B], np.asarray(negative_B, np.int64), seed, step)

    def texts(self, batch: Batch) -> list[str]:
        """The 3 B texts: queries, positives, negatives."""
        rows = [*batch.positive_B, *batch.negative_B]
        return [self.pairs.queries[q] for q in batch.query_B] + [self.pairs.passages[r] for r in rows]

    def loss(self, student: Student, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        count = len(batch.query_B)
        vectors_ND = student(self.texts(batch)).pooled()
        return self.on_vectors(vectors_ND[:count], vectors_ND[count : 2 * count], vectors_ND[2 * count :], batch)

    @abstractmethod
    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        """The loss from vectors as pooled."""

    def ranking(self, student: Student, passages: Sequence[str], queries: Sequence[str], k: int) -> tuple[Hits, float]:
        """The k best passages of each query as a search with what was trained gives them, and bytes a passage takes."""
        passages_PD, queries_QD = student.encode(passages), student.encode(queries)
        if self.unit:
            passages_PD, queries_QD = unit(passages_PD), unit(queries_QD)
        rows_QK, scores_QK = top_rows(queries_QD, passages_PD, k)
        return Hits(rows_QK, scores_QK), float(passages_PD.nbytes) / max(len(passages), 1)

    def settle(self, student: Student, folder: Path) -> None:
        """Write what was trained into `folder`, which the caller makes atomic."""
        student.save(folder)
