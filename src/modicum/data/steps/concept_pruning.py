"""concept-pruning: thin out dense clusters more than complex ones, and keep what is far from each centroid.

Embeddings are clustered. A cluster is as complex as its members are spread times as far as it lies from its neighbours;
complex clusters keep more of their members. Within a cluster the prototypes near the centroid go first.

    C_j   = d_intra(j) d_inter(j)        mean 1 - cos of members to their centroid, of centroid j to its nearest others
    P     = softmax(C / temperature)
    N_j   = clip(P_j N + lambda, l_j, size_j),  sum N_j = N          min sum (N_j - P_j N)^2 within these bounds

lambda is found by bisection, and the sizes are rounded by largest remainder, so that exactly N documents stay.

Abbas et al. 2024, arXiv:2401.04578, sections 3 and 4; temperature and class balance are those of the authors' command
line. Made for image-text pairs, whose embeddings are DINOv2's: for text this is a transfer of the idea, not its claim.
Departs from it: the embedding is LSA of a sample, or the run's encoder's, of each text's beginning; clusters of fewer
than three members get the mean spread of the others, as in the authors' code; N is counted in documents, as there.
Deduplicate first. With few documents in each cluster the hard ones are outliers and keeping them hurts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document
from modicum.data.steps import Step
from modicum.data.steps._selection import Space

CLAIM = {
    "figure": "1.1 points more of ImageNet zero-shot accuracy with 27.7% of the data and compute",
    "where": "abstract",
    "scale": "CLIP ViT-B/32 on LAION",
}

SWEEP = ("keep=0.3",)


@dataclass(frozen=True, kw_only=True)
class Config:
    keep: float = 0.8  # share of the documents that stay
    clusters: int = 100  # at most a tenth of the documents
    neighbours: int = 20  # nearest other centroids, for the distance between clusters
    temperature: float = 0.5
    balance: float = 0.5  # of an equal share of what is kept, which each cluster keeps at least; 0: one document
    hard: bool = True  # keep the farthest from the centroid; false: the nearest
    dims: int = 128  # of LSA, where the run has no encoder
    sample: int = 10_000  # documents that LSA is fitted on
    characters: int = 2_000  # of each text that are embedded

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 <= self.balance <= 1 or self.temperature <= 0:
            raise ValueError("keep lies in (0, 1], balance in [0, 1], temperature is above 0")
        if self.clusters < 1 or self.neighbours < 1 or self.sample < 1:
            raise ValueError("clusters, neighbours and sample are at least 1")


TOY = Config(keep=0.5, clusters=3, dims=8)


class ConceptPruning(Step):
    config: Config
    scope = "corpus"
    relative = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.sample = config.sample
        self.space: Space | None = None

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        space = Space(self.context, self.config.characters)
        return space.fit([d.text for d in sample], self.config.dims).state()

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.space = Space(self.context, self.config.characters).set_state(arrays)

    def signatures(self, documents: Sequence[Document]) -> np.ndarray:
        """float32 [N, D]: unit embeddings; of zeros for a text without a known term."""
        assert self.space
        return self.space([d.text for d in documents])

    def decide(self, signatures_NK: np.ndarray, ids: Sequence[str]) -> dict[int, tuple[str, str]]:
        config, n = self.config, len(signatures_NK)
        if n == 0:
            return {}
        k = max(1, min(config.clusters, n // 10, len(np.unique(signatures_NK[:1000], axis=0))))
        centroids_KD, cluster_N = spherical_kmeans(np.asarray(signatures_NK, np.float32), k, self.context.seed)
        distance_N = 1 - np.einsum("nd,nd->n", signatures_NK, centroids_KD[cluster_N])
        size_K = np.bincount(cluster_N, minlength=k)
        complexity_K = spread(distance_N, cluster_N, k) * apart(centroids_KD, config.neighbours)
        quota_K = quotas(softmax(complexity_K / config.temperature), size_K, round(config.keep * n), config.balance)
        drops: dict[int, tuple[str, str]] = {}
        for j in range(k):
            members = np.flatnonzero(cluster_N == j)
            order = members[np.argsort(-distance_N[members] if config.hard else distance_N[members], kind="stable")]
            for row in order[quota_K[j] :]:
                detail = f"{distance_N[row]:.3f} from centroid {j}, which keeps {quota_K[j]} of {size_K[j]}"
                drops[int(row)] = ("prototype" if config.hard else "outlier", detail)
        return drops


def spherical_kmeans(x_ND: np.ndarray, k: int, seed: int, rounds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(unit centroids_KD, cluster of each row), by faiss on one thread. Empty clusters may remain."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # sums in one order
    try:
        kmeans = faiss.Kmeans(
            x_ND.shape[1], k, niter=rounds, spherical=True, seed=seed + 1, min_points_per_centroid=1, verbose=False
        )
        kmeans.train(x_ND)
        _, cluster_N1 = kmeans.index.search(x_ND, 1)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.asarray(kmeans.centroids).reshape(k, -1), cluster_N1[:, 0].astype(np.int64)


def spread(distance_N: np.ndarray, cluster_N: np.ndarray, k: int) -> np.ndarray:
    """d_intra: mean distance of each cluster's members; of clusters of less than three, the mean of the others'."""
    size_K = np.bincount(cluster_N, minlength=k)
    intra_K = np.bincount(cluster_N, weights=distance_N, minlength=k) / np.maximum(size_K, 1)
    enough = size_K > 2
    intra_K[~enough] = intra_K[enough].mean() if enough.any() else 1.0
    return intra_K


def apart(centroids_KD: np.ndarray, neighbours: int) -> np.ndarray:
    """d_inter: mean 1 - cos of each centroid to its `neighbours` nearest others; 1 for a single one."""
    k = len(centroids_KD)
    if k == 1:
        return np.ones(1)
    distance_KK = 1 - centroids_KD @ centroids_KD.T
    np.fill_diagonal(distance_KK, np.inf)
    nearest: np.ndarray = np.sort(distance_KK, axis=1)[:, : min(neighbours, k - 1)].mean(axis=1).astype(np.float64)
    return nearest


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    weights: np.ndarray = e / e.sum()
    return weights


def quotas(p_K: np.ndarray, size_K: np.ndarray, total: int, balance: float) -> np.ndarray:
    """int64 [K] summing to min(total, all): the integers nearest to p total within [least, size].

    least: `balance` of an equal share of the total, at least 1, below a cluster's size.
    """
    total = min(total, int(size_K.sum()))
    least_K = np.minimum(np.maximum(balance * total / len(p_K), 1), np.maximum(size_K - 1, 0)).astype(np.float64)
    least_K *= min(1.0, total / max(least_K.sum(), 1e-12))  # where even the least are more than there is
    low, high = -float(total) - 1, float(total) + 1
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(p_K * total + middle, least_K, size_K).sum() < total:
            low = middle
        else:
            high = middle
    exact_K = np.clip(p_K * total + high, least_K, size_K)
    floor_K = np.floor(exact_K + 1e-9).astype(np.int64)
    for j in np.argsort(floor_K - exact_K, kind="stable")[: max(total - int(floor_K.sum()), 0)]:
        floor_K[j] += 1
    return floor_K
