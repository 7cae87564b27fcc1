"""minhash: of documents that share most of their word n-grams, keep the first.

    J(A, B)   = |A and B| / |A or B|             over the sets of word n-grams of two documents
    s_k(A)    = min over x in A of h_k(x)        P[s_k(A) = s_k(B)] = J(A, B)
    candidate : all r rows equal in one of b bands, with probability 1 - (1 - J^r)^b
    drop j    : if the fraction of equal s_k with a kept candidate i < j is at least the threshold

Broder 1997 ("On the resemblance and containment of documents"); for language models Lee et al. 2022
(arXiv:2107.06499, appendix A: 5-grams, Jaccard 0.8). Departs from them: bands and rows are
chosen for the threshold (least sum of the false positives' and negatives' areas); candidates are confirmed
by their whole signature rather than by edit similarity; the first document stays and others
are compared with kept ones only, so that no chain of half-similar texts is dropped as one cluster.
Documents with fewer than n words are compared by all their words; Han, kana and the like count one
character as a word. Permutations are multiply-shift hashes (Dietzfelbinger et al. 1997).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from modicum.core.errors import UserError
from modicum.data.document import Document
from modicum.data.steps import Step
from modicum.data.words import combine, mix, ngrams, word_hashes_of

BLOCK = 1 << 8  # n-grams hashed at once: 256 KiB for 128 permutations, so that they stay in the cache

CHARACTERS = 1 << 15  # of texts whose words are hashed at once


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.8  # Jaccard similarity from which two documents are one
    ngram: int = 5  # words
    permutations: int = 128
    seed: int = 1


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
        buckets = self._shared_buckets(signatures_NK)
        kept_in: dict[tuple[int, int], list[int]] = {}
        drops: dict[int, tuple[str, str]] = {}
        need = self.config.threshold
        for row in sorted(buckets):
            candidates = sorted({i for bucket in buckets[row] for i in kept_in.get(bucket, ())})
            if candidates:
                likeness = (signatures_NK[candidates] == signatures_NK[row]).mean(axis=1)
                best = int(np.argmax(likeness))
                if likeness[best] >= need:
                    drops[row] = ("near-duplicate", f"{likeness[best]:.2f} like {ids[candidates[best]]}")
                    continue
            for bucket in buckets[row]:
                kept_in.setdefault(bucket, []).append(row)
        return drops

    def _shared_buckets(self, signatures_NK: np.ndarray) -> dict[int, list[tuple[int, int]]]:
        """row -> its (band, value) buckets that at least one other row is in."""
        shared: dict[int, list[tuple[int, int]]] = {}
        for band in range(self.bands):
            band_rows = np.ascontiguousarray(signatures_NK[:, band * self.rows : (band + 1) * self.rows])
            values = mix(combine(band_rows.astype(np.uint64)))
            _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
            for row in np.flatnonzero(counts[inverse] > 1):
                shared.setdefault(int(row), []).append((band, int(inverse[row])))
        return shared


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
