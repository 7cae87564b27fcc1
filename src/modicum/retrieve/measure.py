"""Quality and cost of an index: recall against queries per second, memory and disk bytes."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from modicum.core.errors import UserError
from modicum.core.files import tree_bytes
from modicum.retrieve.indexes import Index

MADV_DONTNEED = 4


def measure(
    index: Index,
    queries_QD: np.ndarray,
    truth_QK: np.ndarray,
    *,
    subset: Iterable[int] | None = None,
    batch: int | None = None,
    repeats: int = 3,
    folder: str | Path | None = None,
) -> dict[str, float]:
    """recall@K, queries_per_second, seconds_per_query, p50_seconds and p99_seconds of a block, memory_bytes,
    resident_bytes, disk_bytes.

    truth_QK: the true nearest ids of each query, -1 where there are fewer; recall@K is the fraction of them among
    the first K results, the mean over queries. Queries go in blocks of `batch` (all at once if None; 1 for latency);
    the fastest of `repeats` runs counts. Where the index lies in no `folder` yet, it is saved once, to a temporary one,
    to measure its size.
    """
    n_queries, k = truth_QK.shape
    if len(queries_QD) != n_queries or not n_queries:
        raise UserError(f"{len(queries_QD)} queries and {n_queries} rows of truth; give one row for each query")
    chosen = None if subset is None else list(subset)
    step, best = batch or n_queries, float("inf")
    for _ in range(repeats):
        results, ends = [], [time.perf_counter()]
        for i in range(0, n_queries, step):
            results.append(index.search(queries_QD[i : i + step], k, chosen).ids_QK)
            ends.append(time.perf_counter())
        if ends[-1] - ends[0] < best:
            best, taken = ends[-1] - ends[0], np.diff(ends)
    ids_QK = np.concatenate(results)
    if folder is not None:
        disk = tree_bytes(Path(folder))
    else:
        with tempfile.TemporaryDirectory() as made:
            index.save(Path(made) / "index")
            disk = tree_bytes(Path(made) / "index")
    return {
        f"recall@{k}": recall(ids_QK, truth_QK),
        "queries_per_second": n_queries / best,
        "seconds_per_query": best / n_queries,
        "p50_seconds": float(np.percentile(taken, 50)),
        "p99_seconds": float(np.percentile(taken, 99)),
        "memory_bytes": float(index.nbytes()),
        "resident_bytes": float(index.resident_bytes()),
        "disk_bytes": float(disk),
    }


def recall(ids_QK: np.ndarray, truth_QK: np.ndarray) -> float:
    """Mean fraction of the true ids that are among the results; 1 where no query has any."""
    fractions = [
        np.isin(truth[truth >= 0], ids).mean()
        for truth, ids in zip(truth_QK, ids_QK, strict=True)
        if (truth >= 0).any()
    ]
    return float(np.mean(fractions)) if fractions else 1.0


def cold_seconds(index: Index, queries_QD: np.ndarray, k: int, folder: str | Path) -> float:
    """Median seconds of a query that finds no page of the index's files in memory."""
    taken = []
    for query_D in queries_QD:
        evict(folder)
        start = time.perf_counter()
        index.search(query_D[None], k)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def evict(folder: str | Path) -> None:
    """Take the pages of a folder's files out of memory, also those that this process has mapped. Linux alone; what is
    not written back yet stays."""
    files = {str(p.resolve()): p for p in Path(folder).rglob("*") if p.is_file()}
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name in files:
            first, last = (int(part, 16) for part in span.split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)
    for path in files.values():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
