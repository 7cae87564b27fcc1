"""spann: posting lists on disk under a graph of heads in memory.

A fraction of the vectors, the heads, stay in memory with a graph over them. Every other vector lies on disk in the
lists of up to `replicas` heads near it. A query looks up its nearest heads, reads the lists of those that are nearly
as near as the nearest, and compares exactly.

    closure   list of h takes x  unless an h' accepted before has  rng d(h, h') <= d(h, x)      h by rising d(h, x)
    pruning   list of h is read  if  d(q, h) <= ratio d(q, h1)                              h1 the nearest head

d is the squared Euclidean distance. Inner products become distances by one more coordinate, sqrt(M^2 - |x|^2) with
M the longest vector, 0 where all have length 1. Heads are the vectors nearest to the means of a hierarchical
balanced clustering; they are in no list and join the result. A list over `pages` pages of 4 KiB keeps what is
nearest to its head; small lists lie together in a page. Lists lie in the order of the clustering, so that those
of near heads are neighbours in the file: a query's lists are asked for at once and read in a few runs.

Chen et al. 2021, arXiv:2111.08566, section 3; defaults are the authors' for a billion vectors (SPTAG), with 12 pages
for float32. Departs: a vector's last replica is never cut, where the authors' code lets some vectors go from
all lists; no bound on d(h, x) against the nearest head (the paper's epsilon_1, absent from the code); additions wait
in a scanned tail and are built in together, which is neither the paper's nor SPFresh's update. A flat copy on disk
serves small subsets and rebuilding.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.budget.cost import Cost
from modicum.core.errors import CorruptError
from modicum.retrieve.indexes._clusters import leaves, nearest_to_mean
from modicum.retrieve.indexes._stored import BLOCK, Stored

PAGE = 4096  # bytes
GAP = 4 * PAGE  # bytes between two lists that are read as well, rather than with a second read
UNEVEN = 1.35  # leaves come out smaller than the size at which they are no longer split
UNIT = 1e-3  # lengths that differ less count as equal


@dataclass(frozen=True, kw_only=True)
class Config:
    heads: Annotated[float, Field(gt=0, le=1)] = 0.12  # fraction of the vectors that are heads
    branch: Annotated[int, Field(ge=2)] = 32  # centres of one level of the clustering
    balance: Annotated[float, Field(ge=0)] = 1.0  # price of a centre's size, in mean distances at twice the mean size
    replicas: Annotated[int, Field(ge=1)] = 8  # most lists of a vector
    candidates: Annotated[int, Field(ge=1)] = 64  # nearest heads that the closure looks at
    rng: Annotated[float, Field(ge=0)] = 1.0  # relative-neighbourhood factor: larger, fewer replicas
    pages: Annotated[int, Field(ge=1)] = 12  # most pages of a list
    search_heads: Annotated[int, Field(ge=1)] = 32  # nearest heads of a query
    ratio: Annotated[float, Field(ge=1)] = 8.0  # lists are read up to this multiple of the nearest head's distance
    M: Annotated[int, Field(ge=2)] = 16  # links of a head in the graph
    ef_construction: Annotated[int, Field(ge=1)] = 160  # candidates considered when a head is linked
    ef_search: Annotated[int, Field(ge=1)] = 64  # beam of the graph's search
    seed: int = 0


TOY = Config(heads=0.2, replicas=3, candidates=16, pages=1, search_heads=10**6, ratio=1e9)
EFFORT = "search_heads"  # the knob that trades time for recall


class SPANN(Stored):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.head_H = np.empty(0, np.int64)  # rows of the heads
        self.graph: Any = None  # over heads with their additional coordinate; it stores their vectors
        self.start_H = np.empty(0, np.int64)  # byte where a list begins
        self.count_H = np.empty(0, np.int64)  # records of a list
        self.longest = 1.0  # M
        self.lists = -1  # file descriptor
        self.pages_read = 0  # by all searches since it was built or opened

    def cost(self, n_vectors: int, dim: int) -> Cost:
        heads = int(n_vectors * self.config.heads) + 1
        resident = heads * (4 * (dim + 1) + 4 * (2 * self.config.M + 2) + 36) + 16 * n_vectors
        record = 4 * (dim + 1)
        lists = min(self.config.replicas * n_vectors * record, heads * self.config.pages * PAGE)
        closure = self.config.replicas * n_vectors * 20
        return Cost(peak_bytes=resident + closure, disk_bytes=resident + lists + 4 * dim * n_vectors)

    def resident_bytes(self) -> int:
        """Heads, their graph, the table of lists, ids; what lies on disk does not count."""
        graph = 0
        if self.graph is not None:
            links = self.graph.hnsw
            graph = 4 * self.graph.d * self.graph.ntotal + 4 * links.neighbors.size() + 8 * links.offsets.size()
        heads = self.head_H.nbytes + self.start_H.nbytes + self.count_H.nbytes
        return int(graph + heads + self.table_bytes())

    def nbytes(self) -> int:
        return super().nbytes() + (os.fstat(self.lists).st_size if self.lists >= 0 else 0)

    def _structure(self, flat_ND: np.ndarray) -> None:
        import faiss

        c = self.config
        squares = [np.einsum("nd,nd->n", b, b) for b in _blocks(flat_ND)]
        self.longest = float(np.sqrt(max(s.max() for s in squares)))
        groups = leaves(flat_ND, max(1, round(UNEVEN / c.heads)), c.branch, c.balance, c.seed)
        heads_H = np.array([nearest_to_mean(flat_ND, rows) for rows in groups], np.int64)
        self.head_H = np.sort(heads_H)  # into the graph by row: in the order of the clustering it would link badly
        rank_H = np.empty(len(heads_H), np.int64)  # of every head in the clustering
        rank_H[np.searchsorted(self.head_H, heads_H)] = np.arange(len(heads_H))
        self.graph = faiss.IndexHNSWFlat(flat_ND.shape[1] + 1, c.M)
        self.graph.hnsw.efConstruction = c.ef_construction
        for start in range(0, len(self.head_H), BLOCK):
            self.graph.add(self._lifted(np.asarray(flat_ND[self.head_H[start : start + BLOCK]], np.float32)))
        rows_L, heads_L, distances_L = self._closure(flat_ND)
        kept = within_pages(rows_L, heads_L, distances_L, self._limit(flat_ND.shape[1]))
        self._lay_out(flat_ND, rows_L[kept], rank_H[heads_L[kept]], distances_L[kept])
        self.start_H, self.count_H = self.start_H[rank_H], self.count_H[rank_H]

    def _heads_HE(self) -> np.ndarray:
        """Vectors of the heads with their additional coordinate: the graph's own, not a copy."""
        faiss: Any = importlib.import_module("faiss")
        stored = faiss.downcast_index(self.graph.storage)
        return faiss.rev_swig_ptr(stored.get_xb(), stored.ntotal * stored.d).reshape(stored.ntotal, stored.d)

    def _limit(self, dim: int) -> int:
        return max(1, self.config.pages * PAGE // (4 * (dim + 1)))

    def _lifted(self, x_ND: np.ndarray) -> np.ndarray:
        """With the coordinate that turns inner products into distances."""
        rest_N = self.longest**2 - np.einsum("nd,nd->n", x_ND, x_ND)
        rest_N[rest_N < UNIT * self.longest**2] = 0
        return np.ascontiguousarray(np.concatenate([x_ND, np.sqrt(rest_N)[:, None]], axis=1), np.float32)

    def _closure(self, flat_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, numbers of heads, distances) of all replicas of the vectors that are not heads."""
        heads_HE = self._heads_HE()
        is_head_N = np.zeros(len(flat_ND), bool)
        is_head_N[self.head_H] = True
        parts = []
        for start in range(0, len(flat_ND), 1024):
            rows_N = start + np.flatnonzero(~is_head_N[start : start + 1024])
            if len(rows_N):
                x_NE = self._lifted(np.asarray(flat_ND[rows_N], np.float32))
                near_NC, distance_NC = self._nearest_heads(x_NE, self.config.candidates)
                accepted_NC = closure(near_NC, distance_NC, heads_HE, self.config.rng, self.config.replicas)
                n, c = np.nonzero(accepted_NC)
                parts.append((rows_N[n], near_NC[n, c], distance_NC[n, c]))
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        rows_L, heads_L, distances_L = (np.concatenate(p) for p in zip(*parts, strict=True))
        return rows_L, heads_L, distances_L

    def _nearest_heads(self, x_NE: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers_NC, squared distances_NC), nearest first: by the graph, or exactly where all are wanted."""
        faiss: Any = importlib.import_module("faiss")  # its stubs lack what is used here
        heads = self.graph.ntotal
        if count >= heads:
            distance_NC, near_NC = faiss.knn(x_NE, self._heads_HE(), heads, metric=faiss.METRIC_L2)
        else:
            beam = faiss.SearchParametersHNSW(efSearch=max(self.config.ef_search, count))
            distance_NC, near_NC = self.graph.search(x_NE, count, params=beam)
        return near_NC, distance_NC

    def _lay_out(self, flat_ND: np.ndarray, rows_L: np.ndarray, heads_L: np.ndarray, distances_L: np.ndarray) -> None:
        """Write the lists, one after another, each nearest first, and the table of where each begins."""
        order = np.lexsort((distances_L, heads_L))
        rows_L, heads_L = rows_L[order], heads_L[order]
        self.count_H = np.bincount(heads_L, minlength=len(self.head_H))
        record = 4 * (flat_ND.shape[1] + 1)
        self.start_H = page_starts(self.count_H * record)
        with tempfile.TemporaryFile() as file:
            ends = np.cumsum(self.count_H)
            for first in range(0, len(self.head_H), 256):
                last = min(first + 256, len(self.head_H))
                begin = int(ends[first] - self.count_H[first])
                chunk = rows_L[begin : int(ends[last - 1])]
                words_LW = np.empty((len(chunk), flat_ND.shape[1] + 1), np.float32)
                words_LW[:, 0] = chunk.astype(np.int32).view(np.float32)
                words_LW[:, 1:] = flat_ND[chunk]
                at = 0
                for head in range(first, last):
                    file.seek(self.start_H[head])
                    file.write(words_LW[at : at + self.count_H[head]].tobytes())
                    at += self.count_H[head]
            file.flush()
            self._open(os.dup(file.fileno()))

    def _open(self, descriptor: int) -> None:
        self.close()
        self.lists, self.pages_read = descriptor, 0

    def close(self) -> None:
        if self.lists >= 0:
            os.close(self.lists)
        self.lists = -1

    def __del__(self) -> None:
        self.close()

    def _probe(self, queries_QD: np.ndarray, k: int, alive_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        c = self.config
        scarce = 1.0 if alive_N is None else len(alive_N) / alive_N.sum()
        count = min(int(c.search_heads * scarce) + 1 if scarce > 1 else c.search_heads, len(self.head_H))
        zero_Q1 = np.zeros((len(queries_QD), 1), np.float32)
        near_QM, distance_QM = self._nearest_heads(np.hstack([queries_QD, zero_Q1]), count)
        rows_QK = np.full((len(queries_QD), k), -1, np.int64)
        scores_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
        heads_HE, width = self._heads_HE(), queries_QD.shape[1] + 1
        for q, query_D in enumerate(queries_QD):
            near_M = near_QM[q] if near_QM[q, -1] >= 0 else near_QM[q][near_QM[q] >= 0]
            within = np.searchsorted(distance_QM[q, : len(near_M)], c.ratio * distance_QM[q, 0], side="right")
            parts = self._read_lists(near_M[:within], width)
            rows = np.concatenate([self.head_H[near_M], *(words_LW[:, 0].view(np.int32) for words_LW in parts)])
            head_scores = heads_HE[near_M, : width - 1] @ query_D
            scores = np.concatenate([head_scores, *(words_LW[:, 1:] @ query_D for words_LW in parts)])
            if alive_N is not None:
                rows, scores = rows[alive_N[rows]], scores[alive_N[rows]]
            rows, scores = best_unique(rows, scores, k, c.replicas)
            rows_QK[q, : len(rows)], scores_QK[q, : len(rows)] = rows, scores
        return rows_QK, scores_QK

    def _read_lists(self, heads: np.ndarray, width: int) -> list[np.ndarray]:
        """words_LW of each of these heads' lists, the row's number and its vector; valid until the next call.

        Lists that lie near each other come with one read; all reads are announced before the first one waits.
        """
        heads = heads[self.count_H[heads] > 0]
        if not len(heads):
            return []
        order = np.argsort(self.start_H[heads])
        starts, counts = self.start_H[heads][order].tolist(), self.count_H[heads][order].tolist()
        runs = runs_of(starts, [4 * width * n for n in counts])
        buffer = _scratch(sum(end - start for start, end in runs))
        at, lists, n = 0, [], 0
        for start, end in runs:
            if len(runs) > 1:
                os.posix_fadvise(self.lists, start, end - start, os.POSIX_FADV_WILLNEED)
        for start, end in runs:
            if os.preadv(self.lists, [buffer[at : at + end - start]], start) != end - start:
                raise CorruptError("the file of posting lists ends too early; build the index again")
            self.pages_read += (end - 1) // PAGE - start // PAGE + 1
            while n < len(starts) and starts[n] < end:
                words = np.frombuffer(buffer, np.float32, counts[n] * width, at + starts[n] - start)
                lists.append(words.reshape(counts[n], width))
                n += 1
            at += end - start
        return lists

    def _write_structure(self, folder: Path) -> None:
        import faiss

        faiss.write_index(self.graph, str(folder / "heads.faiss"))
        np.save(folder / "heads.npy", np.stack([self.head_H, self.start_H, self.count_H]))
        np.save(folder / "longest.npy", np.array([self.longest]))
        size = os.fstat(self.lists).st_size
        with open(folder / "lists.bin", "wb") as file:
            for start in range(0, size, 1 << 24):
                file.write(os.pread(self.lists, min(1 << 24, size - start), start))

    def _read_structure(self, folder: Path) -> None:
        import faiss

        self.graph = faiss.read_index(str(folder / "heads.faiss"))
        self.head_H, self.start_H, self.count_H = np.load(folder / "heads.npy", allow_pickle=False)
        self.longest = float(np.load(folder / "longest.npy", allow_pickle=False)[0])
        self._open(os.open(folder / "lists.bin", os.O_RDONLY))


def _blocks(flat_ND: np.ndarray) -> Any:
    for start in range(0, len(flat_ND), BLOCK):
        yield np.asarray(flat_ND[start : start + BLOCK], np.float32)


def closure(
    near_NC: np.ndarray, distance_NC: np.ndarray, heads_HE: np.ndarray, rng: float, replicas: int
) -> np.ndarray:
    """accepted_NC: which of each vector's nearest heads, given nearest first, take it into their lists."""
    heads_NCE = heads_HE[np.maximum(near_NC, 0)]
    square_NC = np.einsum("nce,nce->nc", heads_NCE, heads_NCE)
    between_NCC = square_NC[:, :, None] + square_NC[:, None] - 2 * heads_NCE @ heads_NCE.transpose(0, 2, 1)
    accepted_NC = np.zeros(near_NC.shape, bool)
    for c in range(near_NC.shape[1]):
        covered_N = (accepted_NC[:, :c] & (rng * between_NCC[:, :c, c] <= distance_NC[:, c, None])).any(1)
        accepted_NC[:, c] = (near_NC[:, c] >= 0) & ~covered_N & (accepted_NC[:, :c].sum(1) < replicas)
    return accepted_NC


def within_pages(rows_L: np.ndarray, heads_L: np.ndarray, distances_L: np.ndarray, limit: int) -> np.ndarray:
    """kept_L: the `limit` replicas nearest to each head, and the nearest one of a vector that would lose all."""
    order = np.lexsort((distances_L, heads_L))
    starts = np.flatnonzero(np.r_[True, np.diff(heads_L[order]) != 0]) if len(order) else np.empty(0, np.int64)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    kept_L = np.zeros(len(rows_L), bool)
    kept_L[order] = rank < limit
    lost = ~np.isin(rows_L, rows_L[kept_L])
    nearest = np.lexsort((distances_L, rows_L))
    first = np.r_[True, np.diff(rows_L[nearest]) != 0] if len(nearest) else np.empty(0, bool)
    last_L = np.zeros(len(rows_L), bool)
    last_L[nearest[first]] = True
    return kept_L | (lost & last_L)


def page_starts(sizes: np.ndarray) -> np.ndarray:
    """Byte where each list begins: in the page of the one before where it fits there, else at a new page."""
    starts, end = np.empty(len(sizes), np.int64), 0
    for i, size in enumerate(sizes.tolist()):
        if size and end % PAGE and end % PAGE + size > PAGE:
            end += PAGE - end % PAGE
        starts[i] = end
        end += size
    return starts


def runs_of(starts: list[int], sizes: list[int]) -> list[tuple[int, int]]:
    """(first byte, end) of the reads that cover these stretches, given by rising start: over gaps up to `GAP`."""
    runs = [(starts[0], starts[0] + sizes[0])]
    for start, size in zip(starts[1:], sizes[1:], strict=True):
        if start - runs[-1][1] <= GAP:
            runs[-1] = (runs[-1][0], start + size)
        else:
            runs.append((start, start + size))
    return runs


_LOCAL = threading.local()


def _scratch(size: int) -> memoryview:
    """A buffer of this thread, used again by its next query: fresh memory costs more than what is read into it."""
    buffer = getattr(_LOCAL, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _LOCAL.buffer = memoryview(bytearray(max(size, 1 << 20)))
    return buffer


def best_unique(rows: np.ndarray, scores: np.ndarray, k: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows, each once; a row occurs at most `most` times."""
    if len(rows) > (most + 1) * k:
        best = np.argpartition(-scores, (most + 1) * k - 1)[: (most + 1) * k]
        rows, scores = rows[best], scores[best]
    order = np.argsort(-scores, kind="stable")
    first: dict[int, int] = {}
    for position, row in zip(order.tolist(), rows[order].tolist(), strict=True):
        first.setdefault(row, position)
        if len(first) == k:
            break
    kept = np.fromiter(first.values(), np.int64, len(first))
    return rows[kept], scores[kept]
