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
        self.row_N = np.empty(0, np.int64)  # row of every stored id, rising
        self.position_T: np.ndarray | None = None  # of every row in ids_N, -1 where removed; None: none is removed

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

    def table_bytes(self) -> int:
        """Of ids, rows and additions, which every such index has in memory."""
        moved = 0 if self.position_T is None else self.position_T.nbytes
        return self.ids_N.nbytes + self.row_N.nbytes + self.tail_TD.nbytes + moved

    def _number(self) -> None:
        """Positions of the rows, counted once after a change: no search may take time in proportion to N for them."""
        total = len(self.flat_ND) + len(self.tail_TD)
        self.position_T = None
        if len(self.row_N) != total:
            self.position_T = np.full(total, -1, np.int64)
            self.position_T[self.row_N] = np.arange(len(self.row_N))

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
        self._number()

    def _rows(self, rows_R: np.ndarray) -> np.ndarray:
        """vectors_RD of rows of the flat file and the tail."""
        n = len(self.flat_ND)
        if not len(self.tail_TD):
            return np.asarray(self.flat_ND[rows_R])
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
        self._number()
        if len(self.tail_TD) > max(REBUILD * len(self.flat_ND), 64):
            self._again()

    def _remove(self, gone_N: np.ndarray) -> None:
        self.ids_N, self.row_N = self.ids_N[~gone_N], self.row_N[~gone_N]
        self._number()
        if len(self) < (1 - REBUILD) * (len(self.flat_ND) + len(self.tail_TD)):
            self._again()

    def _search(self, queries_QD: np.ndarray, k: int, rows_S: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if rows_S is not None and len(rows_S) <= max(SCAN * len(self), k):
            best_QK, scores_QK = top_rows(queries_QD, self._rows(self.row_N[rows_S]), k)
            return np.where(best_QK < 0, -1, rows_S[best_QK]), scores_QK
        n, position_T = len(self.flat_ND), self.position_T
        if rows_S is not None:
            position_T = np.full(n + len(self.tail_TD), -1, np.int64)
            position_T[self.row_N[rows_S]] = rows_S
        alive_T = None if position_T is None else position_T >= 0
        candidates: list[tuple[np.ndarray, np.ndarray]] = []
        if n and (alive_T is None or alive_T[:n].any()):
            whole = alive_T is None or alive_T[:n].all()
            candidates.append(self._probe(queries_QD, k, None if whole else alive_T[:n]))  # type: ignore[index]
        added_A = np.arange(len(self.tail_TD)) if alive_T is None else np.flatnonzero(alive_T[n:])
        if len(added_A):
            tail_AD = self.tail_TD if alive_T is None else np.ascontiguousarray(self.tail_TD[added_A])
            best_QK, scores_QK = top_rows(queries_QD, tail_AD, k)
            candidates.append((np.where(best_QK < 0, -1, n + added_A[best_QK]), scores_QK))
        if len(candidates) == 1 and candidates[0][0].shape[1] == k:
            rows_QK, scores_QK = candidates[0]  # in order already
        else:
            rows_QK, scores_QK = _merged(candidates, k)
        return rows_QK if position_T is None else np.where(rows_QK < 0, -1, position_T[rows_QK]), scores_QK

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
        self._number()
        if len(self.flat_ND):
            self._read_structure(folder)


def _merged(candidates: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows_QK, scores_QK): the k best of all candidates, -1 where there are fewer."""
    rows_QC, scores_QC = (np.concatenate(parts, axis=1) for parts in zip(*candidates, strict=True))
    scores_QC = np.where(rows_QC < 0, -np.inf, scores_QC)
    order_QK = np.argsort(-scores_QC, axis=1, kind="stable")[:, :k]
    short = ((0, 0), (0, k - order_QK.shape[1]))
    rows_QK = np.pad(np.take_along_axis(rows_QC, order_QK, 1), short, constant_values=-1)
    return rows_QK, np.pad(np.take_along_axis(scores_QC, order_QK, 1), short, constant_values=-np.inf)


def rescored(
    index: Stored, queries_QD: np.ndarray, rows_QC: np.ndarray, scores_QC: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates with their exact inner products, read from the flat file, in their new order."""
    exact_QC = np.full(rows_QC.shape, -np.inf, np.float32)
    for q, rows_C in enumerate(rows_QC):  # in the order of the file, which reads ahead
        real = np.flatnonzero(rows_C >= 0)
        real = real[np.argsort(rows_C[real])]
        exact_QC[q, real] = index._rows(rows_C[real]) @ queries_QD[q]
    order_QC = np.argsort(-exact_QC, axis=1, kind="stable")
    return np.take_along_axis(rows_QC, order_QC, 1), np.take_along_axis(exact_QC, order_QC, 1)
