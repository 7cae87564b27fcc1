"""What indexes with a structure over stored vectors have in common: a flat file, a tail of additions, removals.

The vectors lie in a flat file on disk (float32, one row after another), which a search does not read unless it is
limited to a small subset or has to rescore. A method makes its structure from that file and searches it. Additions
wait in memory, in a tail that every search scans; when the tail or the removed rows exceed a fraction of the whole,
everything is built again.

Shape letters: N rows of the structure, Q queries, C candidates of a query, D dimensions.
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from modicum.core.errors import CorruptError
from modicum.retrieve.indexes import Block, Index, top_rows

BLOCK = 16384  # rows of the flat file in memory at a time
SCAN = 0.02  # subsets up to this fraction are scanned exactly
REBUILD = 0.25  # fraction of removed, or of added, rows at which everything is built again


class Stored(Index):
    """A method defines `_structure`, `_probe`, `_write_structure`, `_read_structure`, `resident_bytes` and `cost`."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.flat_ND = np.empty((0, 0), np.float32)  # rows of the structure, on disk
        self.tail_TD = np.empty((0, 0), np.float32)  # rows N, N + 1, ...: added since
        self.row_N = np.empty(0, np.int64)  # row of every stored id

    @abstractmethod
    def _structure(self, flat_ND: np.ndarray) -> None:
        """Build the structure over all rows of the (memory-mapped) file."""

    @abstractmethod
    def _probe(self, queries_QD: np.ndarray, k: int, alive_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(rows_QC, scores_QC), at least min(k, N) candidates, best first, -1 where missing; rows that are not alive
        are left out."""

    @abstractmethod
    def _write_structure(self, folder: Path) -> None: ...

    @abstractmethod
    def _read_structure(self, folder: Path) -> None: ...

    def nbytes(self) -> int:
        return self.resident_bytes() + self.flat_ND.nbytes

    def _build(self, stream: Iterator[Block]) -> None:
        ids = [np.empty(0, np.int64)]
        with tempfile.TemporaryFile() as spill:
            for ids_N, vectors_ND in stream:
                ids.append(ids_N)
                spill.write(vectors_ND.data)
            self._take(spill, np.concatenate(ids))

    def _take(self, spill: Any, ids_N: np.ndarray) -> None:
        spill.flush()
        self.ids_N, self.row_N = ids_N, np.arange(len(ids_N))
        self.tail_TD = np.empty((0, self.dim or 0), np.float32)
        self.flat_ND = np.empty((0, self.dim or 0), np.float32)
        if len(ids_N) and self.dim:  # the mapping keeps the unnamed file alive
            self.flat_ND = np.memmap(cast(Any, spill), np.float32, "r", shape=(len(ids_N), self.dim))
            self._structure(self.flat_ND)

    def _rows(self, rows_R: np.ndarray) -> np.ndarray:
        """vectors_RD of rows of the flat file and the tail."""
        n = len(self.flat_ND)
        vectors_RD = np.empty((len(rows_R), self.dim or 0), np.float32)
        stored_R = rows_R < n
        vectors_RD[stored_R] = self.flat_ND[rows_R[stored_R]]
        vectors_RD[~stored_R] = self.tail_TD[rows_R[~stored_R] - n]
        return vectors_RD

    def _again(self) -> None:
        """Build everything from what is stored now."""
        ids_N, rows_N = self.ids_N, self.row_N
        with tempfile.TemporaryFile() as spill:
            for start in range(0, len(rows_N), BLOCK):
                spill.write(self._rows(rows_N[start : start + BLOCK]).data)
            self._take(spill, ids_N)

    def _add(self, ids_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        n = len(self.flat_ND) + len(self.tail_TD)
        self.tail_TD = np.concatenate([self.tail_TD, vectors_ND]) if n else vectors_ND.copy()
        if not n:
            self.flat_ND = np.empty((0, vectors_ND.shape[1]), np.float32)
        self.ids_N = np.concatenate([self.ids_N, ids_N])
        self.row_N = np.concatenate([self.row_N, np.arange(n, n + len(ids_N))])
        if len(self.tail_TD) > max(REBUILD * len(self.flat_ND), 64):
            self._again()

    def _remove(self, gone_N: np.ndarray) -> None:
        self.ids_N, self.row_N = self.ids_N[~gone_N], self.row_N[~gone_N]
        if len(self) < (1 - REBUILD) * (len(self.flat_ND) + len(self.tail_TD)):
            self._again()

    def _search(self, queries_QD: np.ndarray, k: int, rows_S: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if rows_S is not None and len(rows_S) <= max(SCAN * len(self), k):
            best_QK, scores_QK = top_rows(queries_QD, self._rows(self.row_N[rows_S]), k)
            return np.where(best_QK < 0, -1, rows_S[best_QK]), scores_QK
        n, total = len(self.flat_ND), len(self.flat_ND) + len(self.tail_TD)
        allowed_N = self.row_N if rows_S is None else self.row_N[rows_S]
        position_T = np.full(total, -1, np.int64)  # of every allowed row in ids_N
        position_T[allowed_N] = np.arange(len(self)) if rows_S is None else rows_S
        alive_T = position_T >= 0
        candidates: list[tuple[np.ndarray, np.ndarray]] = []
        if alive_T[:n].any():
            candidates.append(self._probe(queries_QD, k, None if alive_T[:n].all() else alive_T[:n]))
        if alive_T[n:].any():
            added_A = np.flatnonzero(alive_T[n:])
            best_QK, scores_QK = top_rows(queries_QD, np.ascontiguousarray(self.tail_TD[added_A]), k)
            candidates.append((np.where(best_QK < 0, -1, n + added_A[best_QK]), scores_QK))
        rows_QC, scores_QC = (np.concatenate(parts, axis=1) for parts in zip(*candidates, strict=True))
        scores_QC = np.where(rows_QC < 0, -np.inf, scores_QC)
        order_QK = np.argsort(-scores_QC, axis=1, kind="stable")[:, :k]
        rows_QK, scores_QK = np.take_along_axis(rows_QC, order_QK, 1), np.take_along_axis(scores_QC, order_QK, 1)
        if rows_QK.shape[1] < k:
            short = ((0, 0), (0, k - rows_QK.shape[1]))
            rows_QK = np.pad(rows_QK, short, constant_values=-1)
            scores_QK = np.pad(scores_QK, short, constant_values=-np.inf)
        return np.where(rows_QK < 0, -1, position_T[rows_QK]), scores_QK

    def _write(self, folder: Path) -> None:
        np.save(folder / "rows.npy", self.row_N)
        np.save(folder / "tail.npy", self.tail_TD)
        np.save(folder / "flat.npy", self.flat_ND)
        if len(self.flat_ND):
            self._write_structure(folder)

    def _read(self, folder: Path) -> None:
        self.row_N = np.load(folder / "rows.npy", allow_pickle=False)
        self.tail_TD = np.load(folder / "tail.npy", allow_pickle=False)
        stored = np.load(folder / "flat.npy", allow_pickle=False, mmap_mode="r")
        self.flat_ND = stored if len(stored) else np.array(stored)
        total = len(self.flat_ND) + len(self.tail_TD)
        if len(self.row_N) != len(self) or (len(self) and self.row_N.max() >= total):
            raise CorruptError(f"{folder}: ids, rows and vectors do not belong together; build the index again")
        if len(self.flat_ND):
            self._read_structure(folder)


def rescored(
    index: Stored, queries_QD: np.ndarray, rows_QC: np.ndarray, scores_QC: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates with their exact inner products, read from the flat file, in their new order."""
    exact_QC = np.full(rows_QC.shape, -np.inf, np.float32)
    for q, rows_C in enumerate(rows_QC):
        real = rows_C >= 0
        exact_QC[q, real] = index._rows(rows_C[real]) @ queries_QD[q]
    order_QC = np.argsort(-exact_QC, axis=1, kind="stable")
    return np.take_along_axis(rows_QC, order_QC, 1), np.take_along_axis(exact_QC, order_QC, 1)
