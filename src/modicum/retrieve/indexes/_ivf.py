"""What the inverted-file indexes of `faiss` have in common: a coarse quantizer, lists, removed rows masked out."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any

import numpy as np

from modicum.retrieve.indexes._stored import BLOCK, Stored

CODEWORDS = 256
TRAINING = 64  # vectors per list that the quantizer is trained on


class InvertedFile(Stored):
    """A method says how its faiss index is made, and how many bytes of it stay in memory."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.file: Any = None

    def _lists(self, n_vectors: int) -> int:
        """`lists`, or about 4 sqrt(N) where it is None; at most one list for eight vectors."""
        wanted = self.config.lists or 4 * round(n_vectors**0.5)
        return max(1, min(wanted, n_vectors // 8))

    @abstractmethod
    def _empty(self, quantizer: Any, dim: int, lists: int) -> Any:
        """The untrained faiss index."""

    def _structure(self, flat_ND: np.ndarray) -> None:
        faiss: Any = importlib.import_module("faiss")
        n, dim = flat_ND.shape
        lists = self._lists(n)
        sample = np.random.default_rng(self.config.seed).permutation(n)[: max(TRAINING * lists, 10_000)]
        self.file = self._empty(faiss.IndexFlatIP(dim), dim, lists)
        self.file.cp.seed, self.file.cp.min_points_per_centroid = self.config.seed + 1, 1
        training_SD = np.ascontiguousarray(flat_ND[np.sort(sample)])
        if n < CODEWORDS:  # faiss wants as many vectors as there are codewords
            training_SD = np.resize(training_SD, (CODEWORDS, dim))
        self.file.train(training_SD)
        for start in range(0, n, BLOCK):
            self.file.add(np.ascontiguousarray(flat_ND[start : start + BLOCK]))

    def _candidates(
        self, queries_QD: np.ndarray, count: int, alive_N: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows_QC, scores_QC) by the scores of the lists."""
        faiss: Any = importlib.import_module("faiss")
        options: dict[str, Any] = {"nprobe": min(self.config.probes, self.file.nlist)}
        if alive_N is not None:
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(alive_N, bitorder="little"))
        kind = faiss.IVFPQSearchParameters if isinstance(self.file, faiss.IndexIVFPQ) else faiss.SearchParametersIVF
        scores_QC, rows_QC = self.file.search(queries_QD, count, params=kind(**options))
        return rows_QC, scores_QC
