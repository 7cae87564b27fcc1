"""ivf-pq: inverted lists of product-quantized residuals, rescored from disk.

Every vector lies in the list of its nearest centre c, as the numbers of the nearest codewords of its residual's M
sub-vectors; a query adds up table look-ups, and the best `rescore` times k candidates are compared exactly with the
vectors on disk:

    q . x  ~  q . c + sum over m of q_m . codeword_m[code_m(x - c)]

Jégou, Douze and Schmid 2011 (IEEE TPAMI 33), section IV; the lists and their scan are `faiss.IndexIVFPQ`. With
`rescore=0` scores are those of the codes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.budget.cost import Cost
from modicum.retrieve.indexes._ivf import InvertedFile
from modicum.retrieve.indexes._stored import rescored


@dataclass(frozen=True, kw_only=True)
class Config:
    lists: Annotated[int, Field(ge=1)] | None = None  # None: about 4 sqrt(N)
    probes: Annotated[int, Field(ge=1)] = 16  # lists that a query reads
    bytes: Annotated[int, Field(ge=1)] = 32  # of a vector's code; reduced to what divides the dimensions
    rescore: Annotated[float, Field(ge=0)] = 4.0  # times k candidates that are compared exactly; 0: none
    seed: int = 0


TOY = Config(probes=10**6, bytes=4, rescore=10**6)
EFFORT = "probes"  # the knob that trades time for recall
SWEEP = ("bytes=16", "bytes=32,probes=32")


class IVFPQ(InvertedFile):
    config: Config

    def _code(self, dim: int) -> int:
        return max(m for m in range(1, min(self.config.bytes, dim) + 1) if dim % m == 0)

    def cost(self, n_vectors: int, dim: int) -> Cost:
        lists = self._lists(n_vectors)
        resident = n_vectors * (self._code(dim) + 24) + 4 * lists * dim + 4 * 256 * dim
        sample = 4 * dim * min(n_vectors, max(64 * lists, 10_000))
        return Cost(peak_bytes=resident + sample, disk_bytes=resident + 4 * dim * n_vectors)

    def resident_bytes(self) -> int:
        """Codes, centres, codewords, ids; the vectors for rescoring stay on disk."""
        if self.file is None:
            return 0
        codes = self.file.ntotal * (self.file.code_size + 8) + 4 * self.file.nlist * self.file.d + 4 * 256 * self.file.d
        return int(codes + self.table_bytes())

    def _empty(self, quantizer: Any, dim: int, lists: int) -> Any:
        faiss: Any = importlib.import_module("faiss")
        made = faiss.IndexIVFPQ(quantizer, dim, lists, self._code(dim), 8, faiss.METRIC_INNER_PRODUCT)
        made.pq.cp.seed, made.pq.cp.min_points_per_centroid = self.config.seed + 1, 1
        return made

    def _probe(self, queries_QD: np.ndarray, k: int, alive_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        count = min(max(k, int(k * self.config.rescore)), len(self.flat_ND))
        rows_QC, scores_QC = self._candidates(queries_QD, count, alive_N)
        return rescored(self, queries_QD, rows_QC, scores_QC) if self.config.rescore else (rows_QC, scores_QC)

    def _write_structure(self, folder: Path) -> None:
        importlib.import_module("faiss").write_index(self.file, str(folder / "codes.faiss"))

    def _read_structure(self, folder: Path) -> None:
        self.file = importlib.import_module("faiss").read_index(str(folder / "codes.faiss"))
