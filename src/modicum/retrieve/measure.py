"""Quality and cost of an index: recall against queries per second, memory and disk bytes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from modicum.core.errors import UserError
from modicum.core.files import tree_bytes
from modicum.retrieve.indexes import Index


def measure(
    index: Index,
    queries_QD: np.ndarray,
    truth_QK: np.ndarray,
    *,
    subset: Iterable[int] | None = None,
    batch: int | None = None,
    repeats: int = 3,
) -> dict[str, float]:
    """recall@K, queries_per_second, seconds_per_query, p50_seconds and p99_seconds of a block, memory_bytes,
    resident_bytes, disk_bytes.

    truth_QK: the true nearest ids of each query, -1 where there are fewer; recall@K is the fraction of them among
    the first K results, the mean over queries. Queries go in blocks of `batch` (all at once if None; 1 for latency);
    the fastest of `repeats` runs counts. The index is saved once, to a temporary folder, to measure its size.
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
    recalls = [
        np.isin(truth[truth >= 0], ids).mean()
        for truth, ids in zip(truth_QK, ids_QK, strict=True)
        if (truth >= 0).any()
    ]
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        disk = tree_bytes(Path(folder) / "index")
    return {
        f"recall@{k}": float(np.mean(recalls)) if recalls else 1.0,
        "queries_per_second": n_queries / best,
        "seconds_per_query": best / n_queries,
        "p50_seconds": float(np.percentile(taken, 50)),
        "p99_seconds": float(np.percentile(taken, 99)),
        "memory_bytes": float(index.nbytes()),
        "resident_bytes": float(index.resident_bytes()),
        "disk_bytes": float(disk),
    }
