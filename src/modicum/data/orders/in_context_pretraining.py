"""in-context-pretraining: related documents stand one after another, so that a context is worth reading.

Every document gets its nearest neighbours. A path goes through all of them once: from a document to its most similar
neighbour that was not visited yet, and where there is none, to an unvisited document of the fewest neighbours. The path
is cut into contexts, and the contexts are shuffled. Attention crosses documents, and positions run on.

    edge {i, j}   if j is among the k nearest of i, or i of j
    next(i)     = argmax of cos(i, j) over unvisited neighbours j        none: the unvisited document of least degree

Shi et al. 2023, arXiv:2310.10638, section 2 and algorithm 1, whose printed argmin of similarity is its text's maximum.
Departs from the paper: neighbours are by tokens and not by an encoder: cosines of tf-idf over token ids, randomly
projected and rounded to integers, so that all processes of a run see the same path; exact search within blocks of
`block` documents; near-duplicates stay, so deduplicate first (minhash). Later epochs shuffle the same contexts anew. A
context is one domain's; where a domain's epoch ends, its last one is shorter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.data.orders import Epoch, Order
from modicum.data.shards import Documents

CLAIM = {
    "figure": "in-context classification 66.0 to 71.3, reading comprehension 15% better",
    "where": "abstract; Table 2",
    "scale": "7B parameters, 306B tokens",
}
NOT_MEASURABLE = (
    "the proxy's rows of 128 tokens hold hardly more than one document; it takes contexts of several, and a model that "
    "has learnt to use them"
)
SCALE, LIMIT = 1000, 127  # rounding of unit vectors: products of 256 such numbers are exact in float32


@dataclass(frozen=True, kw_only=True)
class Config:
    neighbours: int = 10  # of each document, by cosine
    dims: int = 256  # of the projection
    tokens: int = 2048  # of each document's beginning that are compared
    block: int = 50_000  # documents that are searched together

    def __post_init__(self) -> None:
        if min(self.neighbours, self.dims, self.tokens, self.block) < 1:
            raise ValueError("neighbours, dims, tokens and block are at least 1")


class InContextPretraining(Order):
    config: Config
    whole_rows = True
    conflicts = frozenset({"document_mask"})

    def __init__(self, config: Config, documents: Documents):
        super().__init__(config, documents)
        self._paths: dict[str, np.ndarray] = {}

    def arrange(self, epoch: Epoch) -> np.ndarray:
        path = self.path(epoch.domain)
        first = np.concatenate([[0], epoch.ends[:-1]])
        return np.concatenate([np.arange(first[d], epoch.ends[d]) for d in path])

    def path(self, domain: str) -> np.ndarray:
        """Numbers of a domain's documents in the order of the path."""
        if domain not in self._paths:
            count = self.documents.documents(domain)
            name = hashlib.blake2b(domain.encode(), digest_size=4).digest()
            shuffled = np.random.default_rng(int.from_bytes(name, "little")).permutation(count)
            blocks = [np.sort(shuffled[at : at + self.config.block]) for at in range(0, count, self.config.block)]
            self._paths[domain] = np.concatenate([block[self._path(domain, block)] for block in blocks])
        return self._paths[domain]

    def _path(self, domain: str, block: np.ndarray) -> np.ndarray:
        config = self.config
        rows = [np.asarray(self.documents.tokens(domain, int(d))[: config.tokens], np.int64) for d in block]
        near_NK, cos_NK = nearest(projected(rows, config.dims), config.neighbours)
        return greedy_path(near_NK, cos_NK)


def projected(rows: Sequence[np.ndarray], dims: int) -> np.ndarray:
    """float32 [N, D] of whole numbers: tf-idf of token ids, projected on random signs, of length about SCALE."""
    from scipy.sparse import csr_matrix

    pairs = [np.unique(row, return_counts=True) for row in rows]
    flat = np.concatenate([ids for ids, _ in pairs])
    vocabulary, columns = np.unique(flat, return_inverse=True)
    df = np.bincount(columns)
    counts = np.concatenate([n for _, n in pairs])
    values = (1 + np.log(counts)) * np.log(1 + (len(rows) - df + 0.5) / (df + 0.5))[columns]
    ends = np.cumsum([0, *(len(ids) for ids, _ in pairs)])
    x_NV = csr_matrix((values, columns, ends), shape=(len(rows), len(vocabulary)))
    signs_VD = np.random.default_rng(0).integers(0, 2, (len(vocabulary), dims)) * 2.0 - 1
    x_ND = x_NV @ signs_VD
    length_N1 = np.sqrt(np.sum(x_ND * x_ND, axis=1, keepdims=True))
    return np.clip(np.rint(x_ND / np.maximum(length_N1, 1e-12) * SCALE), -LIMIT * 2, LIMIT * 2).astype(np.float32)


def nearest(x_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(neighbours, similarities) [N, K] of each row, itself left out, the most similar first, ties by number."""
    import faiss

    index = faiss.IndexFlatIP(x_ND.shape[1])
    index.add(x_ND)
    k = min(k, len(x_ND) - 1)
    if k < 1:
        return np.zeros((len(x_ND), 0), np.int64), np.zeros((len(x_ND), 0), np.float32)
    cos_NK, near_NK = index.search(x_ND, k + 1)
    out_NK, out_cos = np.empty((len(x_ND), k), np.int64), np.empty((len(x_ND), k), np.float32)
    for i in range(len(x_ND)):
        others = near_NK[i] != i
        others[np.flatnonzero(others)[k:]] = False
        order = np.lexsort((near_NK[i][others], -cos_NK[i][others]))
        out_NK[i], out_cos[i] = near_NK[i][others][order], cos_NK[i][others][order]
    return out_NK, out_cos


def greedy_path(near_NK: np.ndarray, cos_NK: np.ndarray) -> np.ndarray:
    """All rows once: on to the most similar unvisited neighbour, else to the unvisited row of least degree."""
    n = len(near_NK)
    edges: list[dict[int, float]] = [{} for _ in range(n)]
    for i in range(n):
        for j, cos in zip(near_NK[i].tolist(), cos_NK[i].tolist(), strict=True):
            edges[i][j] = edges[j][i] = cos
    starts = iter(sorted(range(n), key=lambda i: (len(edges[i]), i)))
    visited = np.zeros(n, bool)
    path: list[int] = []
    at: int | None = None
    while len(path) < n:
        if at is None:
            at = next(i for i in starts if not visited[i])
        visited[at] = True
        path.append(at)
        open_ = [(-cos, j) for j, cos in edges[at].items() if not visited[j]]
        at = min(open_)[1] if open_ else None
    return np.array(path, np.int64)
