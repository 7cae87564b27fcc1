"""index: recall of the true nearest neighbours against queries per second, with bytes and build time.

Vectors: passages of the corpus by latent semantic analysis (TF-IDF, then the leading singular vectors, as
Deerwester et al. 1990), normalised; queries are passages of files that are not in the index. Or the
vectors of an array file: --data vectors.npy, float32 of shape (N, D), of which some rows become the queries.
Queries are answered one by one, as a server does; the truth is the full matrix product.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.bench import fixtures
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.files import fingerprint
from modicum.retrieve import measure as measuring

AXES = Axes(quality=Axis("recall_at_10", "higher"), cost=Axis("queries_per_second", "higher", "1/s"))
LIMITS = {"memory_bytes"}
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale:
    vectors: int = 30_000
    queries: int = 500
    dimensions: int = 128
    corpus_bytes: int = 12_000_000


QUICK = Scale(vectors=1500, queries=60, dimensions=24, corpus_bytes=600_000)
K = 10
BLOCK = 4096  # vectors handed to `build` at a time


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    vectors_ND, queries_QD, truth_QK, data = material(settings.data, scale, seed)
    index = registry.build("index", choice)
    ids = np.arange(len(vectors_ND), dtype=np.int64)
    start = time.perf_counter()
    index.build(((ids[i : i + BLOCK], vectors_ND[i : i + BLOCK]) for i in range(0, len(ids), BLOCK)), settings.budget)
    built = time.perf_counter() - start
    result = measuring.measure(index, queries_QD, truth_QK, batch=1)
    metrics = {
        "recall_at_10": result[f"recall@{K}"],
        "queries_per_second": result["queries_per_second"],
        "index_bytes": result["memory_bytes"],
        "resident_bytes": result["resident_bytes"],
        "p99_seconds": result["p99_seconds"],
        "disk_bytes": result["disk_bytes"],
        "build_seconds": built,
    }
    return Measurement(metrics=metrics, cost=Cost(seconds=built, disk_bytes=result["disk_bytes"]), data=data)


@functools.lru_cache(maxsize=2)
def material(source: str | None, scale: Scale, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """vectors_ND, queries_QD, the true ids_QK, and the data's record; the seed picks the queries."""
    rng = np.random.default_rng(seed)
    if source and source.endswith(".npy"):
        rows_ND, name = _array(source), Path(source).name
    else:
        rows_ND, name = _semantic(source, scale.corpus_bytes, scale.dimensions, scale.vectors + scale.queries)
    wanted = scale.vectors + scale.queries
    if len(rows_ND) < wanted // 2:
        raise UserError(
            f"{name} gives {len(rows_ND)} vectors, {wanted} are wanted; give more data, or type "
            f"--scale vectors={len(rows_ND) * 4 // 5},queries={len(rows_ND) // 10}"
        )
    rows_ND = rows_ND[rng.permutation(len(rows_ND))[:wanted]]
    queries_QD, vectors_ND = rows_ND[: scale.queries], np.ascontiguousarray(rows_ND[scale.queries :])
    truth_QK = np.argsort(-(queries_QD @ vectors_ND.T), axis=1, kind="stable")[:, :K]
    checksum = fingerprint([vectors_ND.shape, float(vectors_ND.sum(dtype=np.float64)), vectors_ND[0].tolist()])
    record = {
        "name": name,
        "vectors": len(vectors_ND),
        "dimensions": int(vectors_ND.shape[1]),
        "checksum": checksum,
    }
    return vectors_ND, queries_QD, truth_QK, record


def _array(source: str) -> np.ndarray:
    try:
        rows_ND = np.load(source, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} is not an array of vectors ({error}); give a .npy file of float32, shape (N, D)"
        ) from None
    if rows_ND.ndim != 2:
        raise UserError(f"{source} has shape {rows_ND.shape}; vectors have shape (N, D)")
    rows_ND = np.asarray(rows_ND, np.float32)
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)


@functools.lru_cache(maxsize=1)
def _semantic(source: str | None, corpus_bytes: int, dimensions: int, limit: int) -> tuple[np.ndarray, str]:
    """LSA vectors of the corpus' paragraphs, unit length, float32."""
    import scipy.sparse as sparse
    from scipy.sparse.linalg import svds

    from modicum.retrieve.bm25 import tokenize

    corpus = fixtures.corpus(source, corpus_bytes, corpus_bytes // 20)
    bags = (tuple(tokenize(p)) for d in corpus.train for p in paragraphs(d.text))
    words = list(dict.fromkeys(bag for bag in bags if len(bag) >= 5))[:limit]  # equal passages would be ties
    known: dict[str, int] = {}
    rows, columns = [], []
    for i, bag in enumerate(words):
        for word in bag:
            rows.append(i)
            columns.append(known.setdefault(word, len(known)))
    counts = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(words), len(known)))
    frequency = np.bincount(counts.indices, minlength=len(known))
    kept = np.flatnonzero(frequency >= 2)
    weights = counts[:, kept].log1p() @ sparse.diags(np.log(len(words) / frequency[kept]).astype(np.float32))
    if min(weights.shape) <= dimensions:
        raise UserError(
            f"{corpus.name} gives {weights.shape[0]} passages of {weights.shape[1]} words, too few for "
            f"{dimensions} dimensions; type --scale dimensions={max(2, min(weights.shape) // 2)}"
        )
    u_ND, s_D, _ = svds(weights.astype(np.float64), k=dimensions, random_state=0)
    rows_ND = (u_ND * s_D).astype(np.float32)
    length = np.linalg.norm(rows_ND, axis=1)
    return rows_ND[length > 1e-6] / length[length > 1e-6, None], corpus.name


def paragraphs(text: str, size: int = 320) -> list[str]:
    """Pieces of about `size` characters, cut at line ends."""
    chunks, chunk = [], ""
    for line in text.splitlines(keepends=True):
        chunk += line
        if len(chunk) >= size:
            chunks.append(chunk)
            chunk = ""
    return [*chunks, chunk] if chunk.strip() else chunks
