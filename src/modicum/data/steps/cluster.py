"""cluster: find the domains of a corpus: k-means of embeddings, near clusters merged; each document gets its cluster's.

    1. unit embeddings of a sample, spherical k-means into `first` clusters
    2. drop clusters whose mean quality is below `least_quality`, where documents have one
    3. merge the two nearest centroids (1 - cos) until `clusters` are left, none larger than `most` of the sample
    document -> the merged cluster of its nearest centroid: domain `cluster-j`, or dropped ("low-quality-cluster")

The first half of CLIMB (Diao et al. 2025, arXiv:2504.13161, section 3): its mixture search over what this finds is
the experiment `climb`. Departs: LSA of the sample unless the run has an encoder; merging goes on to a number of
clusters, not to a distance, and a cluster that would grow above `most` is not merged further, because merging by
distance alone tends to end in one long chain; clusters are numbered by size, the largest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.steps import Step
from modicum.data.steps._selection import Space
from modicum.data.steps.concept_pruning import spherical_kmeans

CLAIM = {"figure": "1B, 40B tokens: 60.41 against 57.93 random", "where": "Table 2", "scale": "950M parameters, 40B"}

NOT_MEASURABLE = "it finds domains and drops none; what they are worth is the mixture's to say"


@dataclass(frozen=True, kw_only=True)
class Config:
    clusters: int = 16  # that are left after merging
    first: int = 1000  # of k-means, at most a tenth of the sample
    least_quality: float = float("-inf")  # mean quality of a cluster, below which it is dropped
    most: float = 0.5  # of the sample that a merged cluster may hold
    dims: int = 128  # of LSA
    characters: int = 2000  # of a document that are embedded
    sample: int = 20_000  # documents

    def __post_init__(self) -> None:
        if not 1 <= self.clusters <= self.first or not 0 < self.most <= 1 or self.sample < 1:
            raise ValueError("1 <= clusters <= first, most lies in (0, 1], sample is at least 1")


TOY = Config(clusters=2, first=4)


class Cluster(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.sample = config.sample
        self.space: Space | None = None
        self.centroids_KD, self.group_K = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        config, texts = self.config, [d.text for d in sample]
        space = Space(self.context, config.characters).fit(texts, config.dims)
        x_ND = space(texts)
        k = max(min(config.first, len(sample) // 10, len(np.unique(x_ND[:2000], axis=0))), 1)
        centroids_KD, cluster_N = spherical_kmeans(x_ND, k, self.context.seed)
        size_K = np.bincount(cluster_N, minlength=k)
        quality_N = np.array([np.nan if d.quality is None else d.quality for d in sample])
        kept_K = np.array([_good(quality_N[cluster_N == j], config.least_quality) for j in range(k)]) & (size_K > 0)
        group_K = np.full(k, -1, np.int64)
        if kept_K.any():
            group_K[kept_K] = merged(centroids_KD[kept_K], size_K[kept_K], config.clusters, config.most)
        return space.state() | {"cluster_centroids": centroids_KD, "cluster_group": group_K}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.space = Space(self.context, self.config.characters).set_state(arrays)
        self.centroids_KD, self.group_K = arrays["cluster_centroids"], arrays["cluster_group"]

    def each(self, document: Document) -> Iterable[Document | Drop]:
        assert self.space
        nearest = int(np.argmax(self.centroids_KD @ self.space([document.text])[0]))
        group = int(self.group_K[nearest])
        if group < 0:
            yield Drop(document.id, "low-quality-cluster", f"cluster {nearest} of k-means")
        else:
            yield dataclasses.replace(document, domain=f"cluster-{group}")


def _good(quality_M: np.ndarray, least: float) -> bool:
    known = quality_M[~np.isnan(quality_M)]
    return not len(known) or bool(known.mean() >= least)


def merged(centroids_KD: np.ndarray, size_K: np.ndarray, count: int, most: float) -> np.ndarray:
    """int64 [K]: the merged cluster of each, numbered by size. The nearest two (1 - cos of their weighted means) become
    one until `count` are left or every pair would hold more than `most` of all."""
    whole = size_K.sum()
    sums = {j: centroids_KD[j].astype(np.float64) * size_K[j] for j in range(len(size_K))}
    sizes = {j: int(n) for j, n in enumerate(size_K)}
    members = {j: [j] for j in sizes}
    while len(sums) > count:
        keys = [*sums]
        unit = np.stack([sums[j] / max(float(np.linalg.norm(sums[j])), 1e-12) for j in keys])
        near = unit @ unit.T
        documents_K = np.array([sizes[j] for j in keys])
        near[(documents_K[:, None] + documents_K[None]) > most * whole] = -np.inf
        np.fill_diagonal(near, -np.inf)
        a, b = np.unravel_index(int(np.argmax(near)), near.shape)
        if near[a, b] == -np.inf:
            break
        first, second = keys[int(a)], keys[int(b)]
        sums[first] = sums[first] + sums.pop(second)
        sizes[first] += sizes.pop(second)
        members[first] += members.pop(second)
    group_K = np.zeros(len(size_K), np.int64)
    for number, key in enumerate(sorted(sums, key=lambda j: (-sizes[j], j))):
        group_K[members[key]] = number
    return group_K
