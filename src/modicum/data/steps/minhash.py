"""minhash: of documents that share most of their word n-grams, keep the first.

    J(A, B)   = |A and B| / |A or B|             over the sets of word n-grams of two documents
    s_k(A)    = min over x in A of h_k(x)        P[s_k(A) = s_k(B)] = J(A, B)
    candidate : all r rows equal in one of b bands, with probability 1 - (1 - J^r)^b
    drop j    : if the fraction of equal s_k with a kept candidate i < j is at least the threshold

`against` names corpora that are curated already (folders, files): their documents come first and all stay, so that a
new one like any of them is dropped, and named with it.

Broder 1997 ("On the resemblance and containment of documents"); for language models Lee et al. 2022
(arXiv:2107.06499, appendix A: 5-grams, Jaccard 0.8). Departs from them: bands and rows are
chosen for the threshold (least sum of the false positives' and negatives' areas); candidates are confirmed
by their whole signature rather than by edit similarity; the first document stays and others
are compared with kept ones only, so that no chain of half-similar texts is dropped as one cluster.
Documents with fewer than n words are compared by all their words; Han, kana and the like count one
character as a word. Permutations are multiply-shift hashes (Dietzfelbinger et al. 1997).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from modicum.core.errors import UserError
from modicum.data.document import Document
from modicum.data.steps import Step
from modicum.data.steps._indexed import folders, ids_of, index
from modicum.data.words import combine, mix, ngrams, word_hashes_of

BLOCK = 1 << 8  # n-grams hashed at once: 256 KiB for 128 permutations, so that they stay in the cache

CHARACTERS = 1 << 15  # of texts whose words are hashed at once


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.8  # Jaccard similarity from which two documents are one
    ngram: int = 5  # words
    permutations: int = 128
    seed: int = 1
    against: list[str] = field(default_factory=list)  # curated folders, or files, whose documents are known


class MinHash(Step):
    config: Config
    scope = "corpus"

    def __init__(self, config: Config):
        super().__init__(config)
        if not 0 < config.threshold <= 1 or config.ngram < 1 or config.permutations < 2:
            raise UserError("minhash: threshold lies in (0, 1], ngram is at least 1, permutations at least 2")
        rng = np.random.default_rng(config.seed)
        self.factors = rng.integers(0, 2**63, config.permutations, np.uint64) * np.uint64(2) + np.uint64(1)
        self.offsets = rng.integers(0, 2**63, config.permutations, np.uint64)
        self.bands, self.rows = bands_and_rows(config.threshold, config.permutations)
        self.sample = 1 if config.against else 0  # nothing of the corpus itself is learnt
        self.indexed, self.indexed_ids = np.zeros((0, config.permutations), np.uint32), list[str]()

    def sources(self) -> Sequence[str]:
        return folders(self.config.against)

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        return index(self.config.against, self.signatures)

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.indexed, self.indexed_ids = arrays["indexed"], ids_of(arrays["indexed_ids"])

    def signatures(self, documents: Sequence[Document]) -> np.ndarray:
        """uint32 [documents, permutations]."""
        out = np.empty((len(documents), self.config.permutations), np.uint32)
        for rows in batches([len(d.text) for d in documents]):
            words = word_hashes_of([documents[i].text for i in rows])
            n = self.config.ngram
            # The n-grams of all texts of the batch at once; those that begin in one and end in the next are left out.
            grams = ngrams(np.concatenate([*words, np.zeros(n, np.uint64)]), n)
            at = 0
            for i, own in zip(rows, words, strict=True):
                if len(own) >= n:
                    out[i] = self._signature(grams[at : at + len(own) - n + 1])
                else:
                    out[i] = self._signature(ngrams(own, len(own)) if len(own) else ngrams(np.zeros(1, np.uint64), 1))
                at += len(own)
        return out

    def _signature(self, hashes: np.ndarray) -> np.ndarray:
        least = np.full(self.config.permutations, 2**64 - 1, np.uint64)
        for start in range(0, len(hashes), BLOCK):
            mixed = hashes[start : start + BLOCK, None] * self.factors
            mixed += self.offsets
            np.minimum(least, mixed.min(axis=0), out=least)
        signature: np.ndarray = (least >> np.uint64(32)).astype(np.uint32)  # its upper half is the least upper half
        return signature

    def decide(self, signatures_NK: np.ndarray, ids: Sequence[str]) -> dict[int, tuple[str, str]]:
        known = len(self.indexed)  # rows are numbered through: the indexed documents first

        def signature(row: int) -> np.ndarray:
            value: np.ndarray = self.indexed[row] if row < known else signatures_NK[row - known]
            return value

        buckets_NB = self._shared_buckets(signatures_NK)
        kept_in: dict[tuple[int, int], list[int]] = {}
        drops: dict[int, tuple[str, str]] = {}
        need = self.config.threshold
        for row in np.flatnonzero((buckets_NB >= 0).any(axis=1)).tolist():
            buckets = [(band, value) for band, value in enumerate(buckets_NB[row].tolist()) if value >= 0]
            candidates = sorted({i for bucket in buckets for i in kept_in.get(bucket, ())}) if row >= known else []
            if candidates:
                likeness = (np.stack([signature(i) for i in candidates]) == signature(row)).mean(axis=1)
                best = int(np.argmax(likeness))
                if likeness[best] >= need:
                    like = candidates[best]
                    name = self.indexed_ids[like] if like < known else ids[like - known]
                    drops[row - known] = ("near-duplicate", f"{likeness[best]:.2f} like {name}")
                    continue
            for bucket in buckets:
                kept_in.setdefault(bucket, []).append(row)
        return drops

    def _shared_buckets(self, signatures_NK: np.ndarray) -> np.ndarray:
        """int32 [known + N, bands]: of each band the row's bucket, -1 where no other row is in it."""
        shared_NB = np.full((len(self.indexed) + len(signatures_NK), self.bands), -1, np.int32)
        for band in range(self.bands):
            columns = slice(band * self.rows, (band + 1) * self.rows)
            both = [np.ascontiguousarray(part[:, columns]) for part in (self.indexed, signatures_NK)]
            values = np.concatenate([mix(combine(part.astype(np.uint64))) for part in both])
            _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
            shared_NB[:, band] = np.where(counts[inverse] > 1, inverse, -1)
        return shared_NB


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive numbers of texts, those of a batch of at most `CHARACTERS` together, or one."""
    out: list[list[int]] = []
    size = 0
    for i, length in enumerate(lengths):
        if not out or size + length > CHARACTERS:
            out.append([])
            size = 0
        out[-1].append(i)
        size += length
    return out


@cache
def bands_and_rows(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows) with bands x rows <= permutations that part pairs best at `threshold`."""
    grid = (np.arange(1000) + 0.5) / 1000
    best = (np.inf, 1, permutations)
    for rows in range(1, permutations + 1):
        bands = permutations // rows
        recall = 1 - (1 - grid**rows) ** bands
        wrong = (recall[grid < threshold].sum() + (1 - recall[grid >= threshold]).sum()) / len(grid)
        best = min(best, (float(wrong), bands, rows))
    return best[1], best[2]
