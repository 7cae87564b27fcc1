"""hnsw: hierarchical navigable small-world graph.

Every vector is linked to about `M` near ones on each of its layers (2 M on the lowest); the number of vectors
per layer falls geometrically. A search descends greedily from the sparse top layer and,
on the lowest, keeps a beam of the `ef_search` best candidates.

    visited  ~  ef_search * M        recall rises with ef_search, and with M and ef_construction at build time

Malkov and Yashunin 2016, arXiv:1603.09320, algorithms 1-5; the graph is `faiss.IndexHNSWFlat`.
Departs from the paper: a removed vector stays in the graph but is never returned; the graph is rebuilt once
more than `rebuild` of it is removed. A small subset is scanned exactly; a larger one is filtered during the
graph search, with the beam widened in proportion. On several threads the
links, hence results at small `ef_search`, may differ between builds.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.budget.cost import Cost
from modicum.core.errors import CorruptError
from modicum.retrieve.indexes import Block, Index, top_rows


@dataclass(frozen=True, kw_only=True)
class Config:
    M: Annotated[int, Field(ge=2, le=512)] = 32  # links of a vector per layer
    ef_construction: Annotated[int, Field(ge=1)] = 200  # candidates considered when a vector is linked
    ef_search: Annotated[int, Field(ge=1)] = 64  # candidates kept by a search (at least k)
    scan: Annotated[float, Field(ge=0, le=1)] = 0.05  # subsets up to this fraction of the index are scanned exactly
    rebuild: Annotated[float, Field(ge=0, le=1)] = 0.25  # removed fraction at which the graph is rebuilt


TOY = Config(M=48, ef_construction=400, ef_search=1000, scan=0.05)
EFFORT = "ef_search"  # the knob that trades time for recall


class HNSW(Index):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.graph: Any = None  # its rows are nodes; `node_N` maps rows of ids_N to them
        self.node_N = np.empty(0, np.int64)  # rising
        self.row_T: np.ndarray | None = None  # of every node, -1 where removed; None: node i is row i

    def cost(self, n_vectors: int, dim: int) -> Cost:
        # Lowest layer 2 M links, upper layers M / (M - 1) more on average, 4 bytes each; growth doubles once.
        stored = n_vectors * (4 * dim + 4 * (2 * self.config.M + 2) + 32)
        return Cost(peak_bytes=2 * stored, disk_bytes=stored)

    def nbytes(self) -> int:
        if self.graph is None:
            return 0
        hnsw = self.graph.hnsw
        links = 4 * hnsw.neighbors.size() + 8 * hnsw.offsets.size() + 4 * hnsw.levels.size()
        return int(4 * self.graph.d * self.graph.ntotal + links + self.ids_N.nbytes + self.node_N.nbytes)

    def _insert(self, ids_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        import faiss

        if self.graph is None:
            self.graph = faiss.IndexHNSWFlat(vectors_ND.shape[1], self.config.M, faiss.METRIC_INNER_PRODUCT)
            self.graph.hnsw.efConstruction = self.config.ef_construction
        first = self.graph.ntotal
        self.graph.add(vectors_ND)
        self.node_N = np.concatenate([self.node_N, np.arange(first, first + len(ids_N))])
        self.ids_N = np.concatenate([self.ids_N, ids_N])

    def _number(self) -> None:
        """Rows of the nodes, counted once after a change and not in every search."""
        self.row_T = None
        if self.graph is not None and len(self.node_N) != self.graph.ntotal:
            self.row_T = np.full(self.graph.ntotal, -1, np.int64)
            self.row_T[self.node_N] = np.arange(len(self.node_N))

    def _build(self, stream: Iterator[Block]) -> None:
        for block in stream:
            self._insert(*block)
        self._number()

    def _add(self, ids_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        self._insert(ids_N, vectors_ND)
        self._number()

    def _remove(self, gone_N: np.ndarray) -> None:
        self.ids_N, self.node_N = self.ids_N[~gone_N], self.node_N[~gone_N]
        if len(self) < (1 - self.config.rebuild) * self.graph.ntotal:
            ids_N, old, nodes_N = self.ids_N, self.graph, self.node_N
            self.graph, self.ids_N, self.node_N = None, np.empty(0, np.int64), np.empty(0, np.int64)
            for start in range(0, len(ids_N), 65536):
                batch = slice(start, start + 65536)
                self._insert(ids_N[batch], old.reconstruct_batch(nodes_N[batch]))
        self._number()

    def _search(self, queries_QD: np.ndarray, k: int, rows_S: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        faiss: Any = importlib.import_module("faiss")  # its stubs lack what is used here
        if rows_S is not None and len(rows_S) <= max(self.config.scan * len(self), k):
            nearest_QK, scores_QK = top_rows(queries_QD, self.graph.reconstruct_batch(self.node_N[rows_S]), k)
            return np.where(nearest_QK < 0, -1, rows_S[nearest_QK]), scores_QK
        allowed_N = self.node_N if rows_S is None else self.node_N[rows_S]
        total = self.graph.ntotal
        options = {"efSearch": min(max(self.config.ef_search * total // len(allowed_N), k), max(total, 1))}
        if len(allowed_N) < total:
            mask = np.zeros(total, bool)
            mask[allowed_N] = True
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        scores_QK, nodes_QK = self.graph.search(queries_QD, k, params=faiss.SearchParametersHNSW(**options))
        if self.row_T is not None:
            nodes_QK = np.where(nodes_QK < 0, -1, self.row_T[nodes_QK])
        return nodes_QK, scores_QK

    def _write(self, folder: Path) -> None:
        import faiss

        np.save(folder / "places.npy", self.node_N)
        if self.graph is not None:
            faiss.write_index(self.graph, str(folder / "graph.faiss"))

    def _read(self, folder: Path) -> None:
        import faiss

        self.node_N = np.load(folder / "places.npy", allow_pickle=False)
        if (folder / "graph.faiss").exists():
            self.graph = faiss.read_index(str(folder / "graph.faiss"))
        total = 0 if self.graph is None else self.graph.ntotal
        if len(self.node_N) != len(self) or (len(self) and self.node_N.max() >= total):
            raise CorruptError(f"{folder}: ids, nodes and graph do not belong together; build the index again")
        self._number()
