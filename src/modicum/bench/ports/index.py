"""index: recall of the true nearest neighbours against queries per second, with bytes and build time.

Vectors: passages of the corpus by latent semantic analysis (TF-IDF, then the leading singular vectors, as
Deerwester et al. 1990), normalised. Or those of an array file: --data vectors.npy, float32 of shape (N, D). Or a
mixture, --scale clusters=2000: clusters of very unequal size, each on a few directions, any number of vectors.
Some rows are kept out of the index; the seed draws the queries from them, and the index is the same for all seeds.

Queries are answered one by one on one thread, as a server does; the truth is the full matrix product. With
--scale recall=0.9 the method's own knob for it (`EFFORT` in its file) is first set to the least effort that reaches
this recall on as many other queries; `effort` is what it was set to. `cold_p50_seconds` is of queries before each of
which the pages of the index's files were taken from memory.

An index that took a minute or more to build is stored in the user's cache folder, under bench/index, so that its
queries can be measured again; what lies there may be removed.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.bench import code, fixtures
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Budget, Cost, Meter, meter
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Progress
from modicum.core.files import cache_home, fingerprint, read_json, write_json
from modicum.retrieve import measure as measuring
from modicum.retrieve.indexes import open_index, top_rows

AXES = Axes(quality=Axis("recall_at_10", "higher"), cost=Axis("queries_per_second", "higher", "1/s"))
LIMITS = {"memory_bytes"}
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale:
    vectors: int = 30_000
    queries: int = 500
    dimensions: int = 128
    corpus_bytes: int = 12_000_000
    clusters: int = 0  # of a mixture; 0: the corpus, or --data
    recall: float = 0.0  # that the effort of a search is set to; 0: knobs as they are


QUICK = Scale(vectors=1500, queries=60, dimensions=24, corpus_bytes=600_000)
K = 10
BLOCK = 16_384  # vectors handed to `build` at a time
KEEP = 60.0  # seconds of building from which an index stays in the user's cache
COLD = 40  # queries measured without pages in memory
EFFORTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Material:
    """vectors_ND of the index, pool_PD from which queries are drawn, and their record."""

    vectors_ND: np.ndarray
    pool_PD: np.ndarray
    record: dict[str, Any]


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    data = material(settings.data, scale)
    rows = np.random.default_rng(seed).permutation(len(data.pool_PD))[: 2 * scale.queries]
    queries_QD, others_QD = data.pool_PD[rows[::2]], data.pool_PD[rows[1::2]]
    folder, built = stored(choice, data, settings.budget)
    index = open_index(folder)
    index.config = choice.config()
    extra: dict[str, float] = {}
    if scale.recall:
        effort = getattr(registry.load("index", choice.method).module, "EFFORT", None)
        if effort:
            extra["effort"] = fit_effort(index, effort, others_QD, truth(data, others_QD), scale.recall)
    result = measuring.measure(index, queries_QD, truth(data, queries_QD), batch=1, folder=folder)
    if index.resident_bytes() < index.nbytes():
        extra["cold_p50_seconds"] = measuring.cold_seconds(index, queries_QD[:COLD], K, folder)
    metrics = {
        "recall_at_10": result[f"recall@{K}"],
        "queries_per_second": result["queries_per_second"],
        "index_bytes": result["memory_bytes"],
        "resident_bytes": result["resident_bytes"],
        "p50_seconds": result["p50_seconds"],
        "p99_seconds": result["p99_seconds"],
        "disk_bytes": result["disk_bytes"],
        "build_seconds": built["seconds"],
        "build_peak_bytes": built["peak_bytes"],
    }
    cost = Cost(seconds=built["seconds"], peak_bytes=int(built["peak_bytes"]), disk_bytes=result["disk_bytes"])
    return Measurement(metrics=metrics | extra, cost=cost, data=data.record)


def fit_effort(index: Any, knob: str, queries_QD: np.ndarray, truth_QK: np.ndarray, target: float) -> float:
    """Set the knob to the least of `EFFORTS` that reaches this recall; the largest where none does."""
    for effort in EFFORTS:
        index.config = dataclasses.replace(index.config, **{knob: effort})
        if measuring.recall(index.search(queries_QD, K).ids_QK, truth_QK) >= target:
            break
    return float(effort)


def truth(data: Material, queries_QD: np.ndarray) -> np.ndarray:
    """ids_QK of the true neighbours, by blocks of the vectors."""
    best_QK, scores_QK = np.empty((len(queries_QD), 0), np.int64), np.empty((len(queries_QD), 0), np.float32)
    for start in range(0, len(data.vectors_ND), 1 << 17):
        rows_QK, inner_QK = top_rows(queries_QD, np.ascontiguousarray(data.vectors_ND[start : start + (1 << 17)]), K)
        rows_QC, scores_QC = np.hstack([best_QK, rows_QK + start]), np.hstack([scores_QK, inner_QK])
        order_QK = np.argsort(-scores_QC, axis=1, kind="stable")[:, :K]
        best_QK, scores_QK = np.take_along_axis(rows_QC, order_QK, 1), np.take_along_axis(scores_QC, order_QK, 1)
    return best_QK


def stored(choice: Choice, data: Material, budget: Budget) -> tuple[Path, dict[str, float]]:
    """The folder of the built index, and the seconds and peak bytes of its building; made where it is not there.

    The knob of its effort does not count: it changes no structure.
    """
    loaded = registry.load("index", choice.method)
    knobs = dataclasses.asdict(choice.config())
    knobs.pop(getattr(loaded.module, "EFFORT", ""), None)
    name = fingerprint(
        [choice.method, knobs, code.code_hash("index", choice.method), data.record["checksum"], budget.memory_bytes]
    )
    folders = [base / f"{choice.method}-{name}" for base in (_scratch(), cache_home() / "bench" / "index")]
    for folder in folders:
        if (folder / "build.json").exists():
            return folder / "index", read_json(folder / "build.json")
    index = registry.build("index", choice)
    with Meter() as spent, Watch(f"build {choice}", len(data.vectors_ND)) as watch:
        index.build(watch.blocks(data.vectors_ND), budget)
    built = {"seconds": spent.seconds, "peak_bytes": float(spent.peak_bytes)}
    folder = folders[built["seconds"] >= KEEP]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    index.save(folder / "index")
    write_json(folder / "build.json", built)
    return folder / "index", built


@functools.lru_cache(maxsize=1)
def _scratch() -> Path:
    """A folder for the indexes of this process, removed at its end."""
    folder = tempfile.mkdtemp(prefix="modicum-index-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Watch:
    """A progress line while an index is built: vectors handed over, then seconds, with the memory of the process."""

    def __init__(self, label: str, total: int):
        self.progress = Progress(label, total, "vectors")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)
        self.lock = threading.Lock()

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _tick(self) -> None:
        while not self.ended.wait(10):
            self._show(0)

    def _show(self, amount: int) -> None:
        with self.lock:
            self.progress.update(amount, memory=f"{meter.resident_now() / 2**20:.0f}MiB")

    def blocks(self, vectors_ND: np.ndarray) -> Any:
        for start in range(0, len(vectors_ND), BLOCK):
            block_ND = np.ascontiguousarray(vectors_ND[start : start + BLOCK])
            yield np.arange(start, start + len(block_ND), dtype=np.int64), block_ND
            if self.progress.total and self.progress.total > 100_000:
                self._show(len(block_ND))


@functools.lru_cache(maxsize=1)
def material(source: str | None, scale: Scale) -> Material:
    """A fixed part of the rows, at most a fifth, is the pool of queries."""
    if scale.clusters:
        rows_ND, name = mixture(scale.vectors + 8 * scale.queries, scale.dimensions, scale.clusters), "clusters"
    elif source and source.endswith(".npy"):
        rows_ND, name = _array(source), Path(source).name
    else:
        wanted = scale.vectors + 8 * scale.queries
        rows_ND, name = _semantic(source, scale.corpus_bytes, scale.dimensions, wanted)
    pool = min(8 * scale.queries, len(rows_ND) // 5)
    if pool < 2 * scale.queries or len(rows_ND) - pool < scale.vectors // 2:
        raise UserError(
            f"{name} gives {len(rows_ND)} vectors, for {scale.vectors} in the index and {2 * scale.queries} queries or "
            f"more; give more data, or type --scale vectors={len(rows_ND) * 4 // 5},queries={len(rows_ND) // 20}"
        )
    if not scale.clusters:  # whose rows are in no order
        rows_ND = rows_ND[np.random.default_rng(0).permutation(len(rows_ND))]
    pool_PD, vectors_ND = np.array(rows_ND[:pool]), rows_ND[pool : pool + scale.vectors]
    total = sum(float(vectors_ND[i : i + BLOCK].sum(dtype=np.float64)) for i in range(0, len(vectors_ND), BLOCK))
    record = {
        "name": name,
        "vectors": len(vectors_ND),
        "dimensions": int(vectors_ND.shape[1]),
        "checksum": fingerprint([vectors_ND.shape, total, vectors_ND[0].tolist()]),
    }
    return Material(vectors_ND, pool_PD, record)


def mixture(count: int, dimensions: int, clusters: int, seed: int = 0) -> np.ndarray:
    """rows_ND of unit length in random order, in a temporary file: as embeddings are, in clusters within clusters.

    The n-th cluster has a part of the rows in proportion to n^-0.8. Centres lie around a tenth as many centres of their
    own; a cluster spreads over 16 directions of its own with falling deviations, and a little over all of them.
    """
    rng = np.random.default_rng(seed)
    weight_C = np.arange(1, clusters + 1) ** -0.8
    cluster_N = rng.choice(clusters, count, p=weight_C / weight_C.sum()).astype(np.int32)
    order_N, sizes_C = np.argsort(cluster_N, kind="stable"), np.bincount(cluster_N, minlength=clusters)
    topics_TD = rng.standard_normal((-(-clusters // 10), dimensions))
    centre_CD = topics_TD[rng.integers(0, len(topics_TD), clusters)] + 0.7 * rng.standard_normal((clusters, dimensions))
    centre_CD /= np.linalg.norm(centre_CD, axis=1, keepdims=True)
    spread_R = 0.35 * np.arange(1, 17) ** -0.35
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * count * dimensions)
        rows_ND = np.memmap(file, np.float32, "r+", shape=(count, dimensions))
        start = 0
        for c, size in enumerate(sizes_C.tolist()):
            basis_RD = rng.standard_normal((len(spread_R), dimensions)) / dimensions**0.5
            x_ND = centre_CD[c] + (rng.standard_normal((size, len(spread_R))) * spread_R) @ basis_RD
            x_ND += 0.15 / dimensions**0.5 * rng.standard_normal((size, dimensions))
            rows_ND[order_N[start : start + size]] = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
            start += size
    return rows_ND


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
