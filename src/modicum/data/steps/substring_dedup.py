"""substring-dedup: cut passages that stand word for word in another document, or again in the same one.

    a window of n words is repeated   if it stands in two places of the sample
    cut from d                        every maximal run of repeated windows that another document owns

A repeated substring of n words or more is exactly a run of repeated windows of n words, so hashes of windows give
what a suffix array would, without sorting all suffixes. Of a repeated window the document with the least sample key
is the owner and keeps it, once. Words are compared without case, and what lies between them does not count. What is
left of a document that is mostly repeated (`most`) is dropped; the seams are put together with an empty line.

Lee et al. 2022, arXiv:2107.06499, section 4.2 (ExactSubstr: 50 tokens, suffix array over the corpus). Departs: words
instead of tokens; windows are counted in a sample, so that memory is bounded (12 bytes a word); cuts end at words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.steps import Step, sample_key
from modicum.data.steps.decontaminate import _WORD, hashes
from modicum.data.words import ngrams

CLAIM = {
    "figure": "models emit memorised text ten times less often",
    "where": "abstract",
    "scale": "1.5B parameters, C4",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    n: int = 50  # words from which a repeated passage counts
    most: float = 0.8  # of a document's words that may be cut; with more it is dropped
    sample: int = 200_000  # documents whose windows are counted

    def __post_init__(self) -> None:
        if self.n < 2 or not 0 < self.most <= 1 or self.sample < 1:
            raise ValueError("n is at least 2, most lies in (0, 1], sample is at least 1")


TOY = Config(n=8)


class SubstringDedup(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.sample, self.spans_cut, self.words_cut = config.sample, 0, 0
        self.windows, self.owners = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        """Repeated windows in order, and the key of the document that owns each."""
        windows: list[np.ndarray] = []
        documents: list[np.ndarray] = []
        keys = np.array([_key(d.id) for d in sample], np.uint64)
        for number, document in enumerate(sample):
            own = self._windows(hashes(document.text))
            windows.append(own)
            documents.append(np.full(len(own), number, np.uint32))
        flat, owner = np.concatenate(windows), np.concatenate(documents)
        order = np.argsort(flat, kind="stable")
        flat, owner = flat[order], owner[order]
        first = np.concatenate([[True], flat[1:] != flat[:-1]]) if len(flat) else np.zeros(0, bool)
        starts = np.flatnonzero(first)
        counts = np.diff(np.append(starts, len(flat)))
        least = np.minimum.reduceat(keys[owner], starts) if len(flat) else np.zeros(0, np.uint64)
        return {"repeated_windows": flat[starts[counts > 1]], "repeated_owners": least[counts > 1]}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.windows, self.owners = arrays["repeated_windows"], arrays["repeated_owners"]

    def _windows(self, words: np.ndarray) -> np.ndarray:
        n = self.config.n
        return ngrams(words, n) if len(words) >= n else np.zeros(0, np.uint64)

    def each(self, document: Document) -> Iterable[Document | Drop]:
        words = hashes(document.text)
        own = self._windows(words)
        if not len(own) or not len(self.windows):
            yield document
            return
        at = np.minimum(np.searchsorted(self.windows, own), len(self.windows) - 1)
        repeated = self.windows[at] == own
        again = np.ones(len(own), bool)
        again[np.unique(own, return_index=True)[1]] = False
        starts = np.flatnonzero(repeated & (again | (self.owners[at] != np.uint64(_key(document.id)))))
        if not len(starts):
            yield document
            return
        edge = np.zeros(len(words) + 1, np.int64)
        np.add.at(edge, starts, 1)
        np.add.at(edge, starts + self.config.n, -1)
        cut_N = np.cumsum(edge[:-1]) > 0
        kept, spans = cut(document.text, cut_N)
        self.spans_cut, self.words_cut = self.spans_cut + spans, self.words_cut + int(cut_N.sum())
        if cut_N.mean() > self.config.most or not kept:
            yield Drop(document.id, "all-duplicate", f"{cut_N.mean():.0%} of {len(words)} words stand elsewhere too")
        else:
            yield dataclasses.replace(document, text=kept)

    def close(self) -> dict[str, float]:
        return {"spans_cut": self.spans_cut, "words_cut": self.words_cut}


def _key(document_id: str) -> int:
    return int.from_bytes(sample_key(document_id), "big")


def cut(text: str, cut_N: np.ndarray) -> tuple[str, int]:
    """The text without the words that are cut, its parts with an empty line between them; the number of spans cut."""
    words = [match.span() for match in _WORD.finditer(text)]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], cut_N, [False]]).astype(np.int8)))
    parts, at = [], 0
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        parts.append(text[at : words[first][0]])
        at = words[last - 1][1]
    parts.append(text[at:])
    stripped = [part.strip() for part in parts]
    return "\n\n".join(p for p in stripped if any(c.isalnum() for c in p)), len(edges) // 2
