"""port index: nearest-neighbour search by inner product, with streaming builds, updates and subsets.

Shape letters: N vectors, Q queries, K results, D dimensions. Where encoders give vectors of length 1, the inner
product is the cosine. An index on disk is a folder: `index.json` (method, knobs, checksums) and the method's own
files, none of them pickled.

A method's module sets `TOY` to settings under which it is exhaustive, hence exact, on some hundred vectors.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from modicum.budget.budget import Budget
from modicum.budget.cost import Cost
from modicum.core import choice, files, registry
from modicum.core.errors import CorruptError, UserError
from modicum.retrieve import manifest

BASELINE = "exact"
FORMAT = 1

Block = tuple[np.ndarray, np.ndarray]  # ids_N int64, vectors_ND float32


@dataclass(frozen=True)
class Hits:
    """Results of Q queries, best first; missing results have id -1 and score -inf."""

    ids_QK: np.ndarray  # int64
    scores_QK: np.ndarray  # float32

    @classmethod
    def empty(cls, n_queries: int, k: int) -> Hits:
        return cls(np.full((n_queries, k), -1, np.int64), np.full((n_queries, k), -np.inf, np.float32))


class Index(registry.Method):
    """Base of every index. A method defines `_build`, `_add`, `_remove`, `_search`, `_write`, `_read`, `cost`.

    The public calls check their input once here, so a method gets only new, unique, non-negative int64 ids
    and finite, C-contiguous float32 vectors of the index's own width.
    """

    def __init__(self, config: Any):
        self.config = config
        self.dim: int | None = None  # D, known from the first block on
        self.ids_N = np.empty(0, np.int64)  # what is stored, in the method's own order

    def __len__(self) -> int:
        return len(self.ids_N)

    def build(self, stream: Iterable[Block], budget: Budget | None = None) -> None:
        """Fill an empty index from blocks of (ids_N, vectors_ND); the stream is read once and never collected.

        Raises `BudgetError`, before taking the block that would not fit, when `cost` exceeds the budget.
        """
        if len(self):
            raise UserError(f"this index already holds {len(self)} vectors; build an empty one, or call add")
        self._build(self._checked(stream, budget or Budget()))

    def _checked(self, stream: Iterable[Block], budget: Budget) -> Iterator[Block]:
        taken = [np.empty(0, np.int64)]
        count, top = 0, -1
        for ids, vectors in stream:
            ids_N, vectors_ND = self._check(ids, vectors)
            if not len(ids_N):
                continue
            if ids_N.min() <= top:  # rising ids, the common case, need no look-up
                _refuse_taken(ids_N, np.concatenate(taken))
            count, top = count + len(ids_N), max(top, int(ids_N.max()))
            budget.require(self.cost(count, vectors_ND.shape[1]), f"an index of {count} vectors")
            taken.append(ids_N)
            yield ids_N, vectors_ND

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors_ND under new ids_N. An id that is already stored is a `UserError`: remove it first."""
        ids_N, vectors_ND = self._check(ids, vectors)
        _refuse_taken(ids_N, self.ids_N)
        if len(ids_N):
            self._add(ids_N, vectors_ND)

    def remove(self, ids: Iterable[int]) -> int:
        """Remove these ids; those not stored are skipped. Returns how many were removed."""
        gone_N = np.isin(self.ids_N, np.fromiter(ids, np.int64))
        if gone_N.any():
            self._remove(gone_N)
        return int(gone_N.sum())

    def search(self, queries_QD: np.ndarray, k: int, subset: Iterable[int] | None = None) -> Hits:
        """The k nearest of every query, best first, among `subset` (ids) if given. See `Hits` for missing results."""
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        if k < 1:
            raise UserError(f"k={k} is not a number of results; ask for 1 or more")
        if queries_QD.ndim != 2 or (self.dim is not None and queries_QD.shape[1] != self.dim):
            raise UserError(
                f"queries of shape {queries_QD.shape} do not fit an index of width {self.dim}; "
                "give an array of (queries, width) from the encoder that made the index"
            )
        rows_S = None if subset is None else np.flatnonzero(np.isin(self.ids_N, np.fromiter(subset, np.int64)))
        if not len(self) or not len(queries_QD) or (rows_S is not None and not len(rows_S)):
            return Hits.empty(len(queries_QD), k)
        rows_QK, scores_QK = self._search(queries_QD, k, rows_S)
        missing_QK = rows_QK < 0
        ids_QK = np.where(missing_QK, -1, self.ids_N[np.where(missing_QK, 0, rows_QK)])
        return Hits(ids_QK.astype(np.int64), np.where(missing_QK, -np.inf, scores_QK).astype(np.float32))

    def save(self, path: str | Path) -> None:
        """Write the folder `path` atomically."""
        info = next(m for m in registry.methods("index").values() if m.module == type(self).__module__)
        with files.atomic_directory(path) as folder:
            np.save(folder / "ids.npy", self.ids_N)
            self._write(folder)
            files.write_json(
                folder / "index.json",
                {
                    "format": FORMAT,
                    "method": info.key,
                    "knobs": dataclasses.asdict(self.config),
                    "dim": self.dim,
                    "count": len(self),
                    "files": manifest.describe(folder),
                },
            )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a saved folder; raises `CorruptError` when a file is not what was written."""
        index = open_index(path)
        if not isinstance(index, cls):
            raise UserError(f"{path} holds a {type(index).__name__}, not a {cls.__name__}; open it with open_index")
        return index

    def _check(self, ids: np.ndarray, vectors: np.ndarray) -> Block:
        ids_N, vectors_ND = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(vectors, np.float32)
        if vectors_ND.ndim != 2 or ids_N.shape != vectors_ND.shape[:1] or vectors_ND.shape[1] < 1:
            raise UserError(
                f"ids of shape {ids_N.shape} and vectors of shape {vectors_ND.shape} do not belong "
                "together; give (N,) and (N, D)"
            )
        if self.dim not in (None, vectors_ND.shape[1]):
            raise UserError(
                f"vectors have {vectors_ND.shape[1]} dimensions, the index has {self.dim}; "
                "encode them with the index's own encoder"
            )
        if not np.isfinite(vectors_ND).all():
            raise UserError("a vector holds NaN or infinity; encode its text again")
        if len(ids_N) and ids_N.min() < 0:
            raise UserError(f"id {ids_N.min()} is negative; ids are 0 or more")
        unique, counts = np.unique(ids_N, return_counts=True)
        if (counts > 1).any():
            raise UserError(f"id {unique[counts > 1][0]} is given twice; give every vector an id of its own")
        self.dim = vectors_ND.shape[1]
        return ids_N, vectors_ND

    @abstractmethod
    def cost(self, n_vectors: int, dim: int) -> Cost:
        """Predicted peak_bytes while building and disk_bytes once saved."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that a search may read: vectors, links, ids; those on disk count too."""

    def resident_bytes(self) -> int:
        """Bytes that must be in memory while it searches: all of them, unless the method keeps some on disk."""
        return self.nbytes()

    @abstractmethod
    def _build(self, stream: Iterator[Block]) -> None:
        """Store every block and set `ids_N`."""

    @abstractmethod
    def _add(self, ids_N: np.ndarray, vectors_ND: np.ndarray) -> None: ...

    @abstractmethod
    def _remove(self, gone_N: np.ndarray) -> None:
        """Drop the rows that are True and update `ids_N`."""

    @abstractmethod
    def _search(self, queries_QD: np.ndarray, k: int, rows_S: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(rows_QK, scores_QK), rows into `ids_N`, best first, -1 where missing; within `rows_S` (sorted) if given."""

    @abstractmethod
    def _write(self, folder: Path) -> None: ...

    @abstractmethod
    def _read(self, folder: Path) -> None:
        """Restore from `folder`; `config`, `dim` and `ids_N` are already set."""


def _refuse_taken(ids_N: np.ndarray, taken_N: np.ndarray) -> None:
    both = np.intersect1d(ids_N, taken_N)
    if len(both):
        raise UserError(f"id {both[0]} is already stored; remove it first or use another id")


def open_index(path: str | Path) -> Any:
    """The index saved in folder `path`, whatever its method."""
    folder = Path(path)
    header = manifest.read_header(folder, "index.json", "index", "modicum index SOURCE --out FOLDER")
    if header.get("format") != FORMAT:
        raise CorruptError(
            f"{folder / 'index.json'} has format {header.get('format')!r}, this version reads {FORMAT}; "
            "build the index again"
        )
    manifest.verify(folder, header["files"])
    index = registry.build("index", choice.Choice("index", header["method"], header["knobs"]))
    index.dim = header["dim"]
    index.ids_N = np.load(folder / "ids.npy", allow_pickle=False)
    if len(index.ids_N) != header["count"]:
        raise CorruptError(f"{folder} holds {len(index.ids_N)} ids, its header says {header['count']}; build it again")
    index._read(folder)
    return index


def top_rows(queries_QD: np.ndarray, vectors_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact (rows_QK, scores_QK) by scanning vectors_ND (memory-mapped or not); -1 where k exceeds N."""
    import faiss

    scores_QK, rows_QK = faiss.knn(queries_QD, vectors_ND, k, metric=faiss.METRIC_INNER_PRODUCT)
    return rows_QK, scores_QK
