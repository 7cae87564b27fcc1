"""exact: compare the query with every vector.

    score(q, x) = q . x        top k over all stored x

The ground truth for other indexes. `faiss` scans the vectors block by block with SIMD or BLAS
(the kernel of its `IndexFlatIP`), straight from a memory-mapped file, so a saved index of any size opens at
once and needs no more memory than the pages it touches. A build spills to an unnamed temporary file and keeps
one block in memory. A subset is gathered and scanned in blocks: its time grows with the subset, not with the index.

Douze et al. 2024, arXiv:2401.08281 (faiss). `add` and `remove` copy the vectors: O(N D) each; give them in batches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from modicum.budget.cost import Cost
from modicum.retrieve.indexes import Block, Index, top_rows


@dataclass(frozen=True, kw_only=True)
class Config:
    block: int = 65536  # vectors gathered at a time when a subset is searched


TOY = Config(block=64)


class Exact(Index):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vectors_ND = np.empty((0, 0), np.float32)

    def cost(self, n_vectors: int, dim: int) -> Cost:
        stored = n_vectors * (4 * dim + 8)
        return Cost(peak_bytes=stored, disk_bytes=stored)

    def nbytes(self) -> int:
        return self.vectors_ND.nbytes + self.ids_N.nbytes

    def _build(self, stream: Iterator[Block]) -> None:
        ids = [np.empty(0, np.int64)]
        with tempfile.TemporaryFile() as spill:
            for ids_N, vectors_ND in stream:
                ids.append(ids_N)
                spill.write(vectors_ND.data)
            spill.flush()
            self.ids_N = np.concatenate(ids)
            if len(self.ids_N) and self.dim:  # the mapping keeps the unnamed file alive
                self.vectors_ND = np.memmap(cast(Any, spill), np.float32, "r", shape=(len(self.ids_N), self.dim))

    def _add(self, ids_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        self.vectors_ND = np.concatenate([self.vectors_ND, vectors_ND]) if len(self) else vectors_ND.copy()
        self.ids_N = np.concatenate([self.ids_N, ids_N])

    def _remove(self, gone_N: np.ndarray) -> None:
        self.ids_N, self.vectors_ND = self.ids_N[~gone_N], self.vectors_ND[~gone_N]

    def _search(self, queries_QD: np.ndarray, k: int, rows_S: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if rows_S is None:
            return top_rows(queries_QD, self.vectors_ND, k)
        best_rows = np.full((len(queries_QD), k), -1, np.int64)
        best_scores = np.full((len(queries_QD), k), -np.inf, np.float32)
        for start in range(0, len(rows_S), self.config.block):
            rows_B = rows_S[start : start + self.config.block]
            nearest_QK, scores_QK = top_rows(queries_QD, np.ascontiguousarray(self.vectors_ND[rows_B]), k)
            rows_QK = np.where(nearest_QK < 0, -1, rows_B[nearest_QK])
            scores = np.concatenate([best_scores, np.where(nearest_QK < 0, -np.inf, scores_QK)], axis=1)
            rows = np.concatenate([best_rows, rows_QK], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best_rows, best_scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return best_rows, best_scores

    def _write(self, folder: Path) -> None:
        np.save(folder / "vectors.npy", self.vectors_ND)

    def _read(self, folder: Path) -> None:
        self.vectors_ND = np.load(folder / "vectors.npy", mmap_mode="r" if len(self) else None, allow_pickle=False)
