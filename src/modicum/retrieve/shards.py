"""An index in shards: each searched by itself, the best of all merged. In this process, or one Ray actor for each.

Shape letters: N vectors, Q queries, K results, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modicum.core.registry import build
from modicum.retrieve.indexes import Hits, open_index

Engine = Literal["local", "ray"]


class Shards:
    """`count` indexes of one kind; vector r belongs to shard r mod count. Results are the same with either engine."""

    def __init__(self, index: str, count: int, engine: Engine = "local"):
        self.index, self.count, self.engine = index, count, engine
        self._ray = _started(count) if engine == "ray" else None
        self._shards = [self._shard(None) for _ in range(count)]

    def _shard(self, folder: str | None) -> Any:
        if self._ray is None:
            return _Shard(self.index, folder)
        import ray

        return ray.remote(num_cpus=0)(_Shard).remote(self.index, folder)

    def _all(self, name: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """A method of every shard, at once where they are actors."""
        if self._ray is None:
            return [getattr(s, name)(*a) for s, a in zip(self._shards, arguments, strict=True)]
        import ray

        return list(ray.get([getattr(s, name).remote(*a) for s, a in zip(self._shards, arguments, strict=True)]))

    def add(self, rows_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        of_N = rows_N % self.count
        self._all("add", [(rows_N[of_N == s], vectors_ND[of_N == s]) for s in range(self.count)])

    def search(self, queries_QD: np.ndarray, k: int, rows: Iterable[int] | None = None) -> Hits:
        """The k best of all shards; equal scores go to the lower row."""
        subset = None if rows is None else np.fromiter(rows, np.int64)
        return merged(self._all("search", [(queries_QD, k, subset)] * self.count), k)

    def nbytes(self) -> int:
        return sum(self._all("nbytes", [()] * self.count))

    def save(self, folder: Path) -> None:
        """A folder for each shard; with actors on several machines it must be on a file system that all see."""
        self._all("save", [(str(folder / f"shard-{s:05d}"),) for s in range(self.count)])

    def open(self, folder: Path) -> None:
        self._shards = [self._shard(str(folder / f"shard-{s:05d}")) for s in range(self.count)]

    def close(self) -> None:
        """End what was started for it; a local one needs nothing."""
        if self._ray is not None:
            self._ray.__exit__()
            self._ray, self._shards = None, []


class _Shard:
    def __init__(self, index: str, folder: str | None):
        self.index: Any = build("index", index) if folder is None else open_index(folder)

    def add(self, rows_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        if len(rows_N):
            self.index.add(rows_N, np.array(vectors_ND))

    def search(self, queries_QD: np.ndarray, k: int, rows: np.ndarray | None) -> Hits:
        hits: Hits = self.index.search(queries_QD, k, rows)
        return hits

    def nbytes(self) -> int:
        return int(self.index.nbytes())

    def save(self, folder: str) -> None:
        self.index.save(folder)


def _started(count: int) -> Any:
    from modicum.data.engines.ray import Ray

    return Ray(count).__enter__()


def merged(parts: list[Hits], k: int) -> Hits:
    """The k best of several lists for each query."""
    ids_QM = np.concatenate([p.ids_QK for p in parts], 1)
    scores_QM = np.concatenate([p.scores_QK for p in parts], 1)
    order_QM = np.stack([np.lexsort((i, -s)) for i, s in zip(ids_QM, scores_QM, strict=True)]) if len(ids_QM) else None
    if order_QM is None:
        return Hits.empty(0, k)
    order_QK = order_QM[:, :k]
    return Hits(np.take_along_axis(ids_QM, order_QK, 1), np.take_along_axis(scores_QM, order_QK, 1))
