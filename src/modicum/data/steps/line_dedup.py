"""line-dedup: take out lines and paragraphs that stand in many documents, and those that a document repeats.

Menus, notices and signatures are the same on every page of a site. A sample of the documents tells which lines they
are:

    drop line l   if   |{d in sample: l in d}| >= documents       or l stood in the same document before

Wenzek et al. 2020 (CCNet, arXiv:1911.00359, section 3.1) drop every paragraph that was seen anywhere before in a shard,
by hashes of its normalised text, as here: case, digits and punctuation do not count. Departs from it: a line is dropped
for standing in several documents, and then everywhere, so that nothing depends on order; counted is a sample, so that
memory is bounded; lines shorter than `shortest` characters stay, as headings and list items are repeated by nature. A
text that is empty afterwards is dropped.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.steps import Step, sampled
from modicum.data.words import _words, mix, powers

_PARAGRAPH, _LINE = re.compile(r"(\n[^\S\n]*\n\s*)"), re.compile(r"(\n)")
_OTHER_ENDS = re.compile("[\r\v\f\x1c-\x1e\x85\u2028\u2029]")

CHARACTERS = 1 << 15  # of documents whose lines are hashed at once: short ones cost most by themselves


@dataclass(frozen=True, kw_only=True)
class Config:
    unit: str = "line"  # line, paragraph
    documents: int = 3  # of the sample that a line stands in, from which it is dropped everywhere
    shortest: int = 20  # characters; shorter lines stay
    within: bool = True  # drop repetitions within a document too
    sample: int = 100_000  # documents

    def __post_init__(self) -> None:
        if self.unit not in ("line", "paragraph") or self.documents < 2 or self.sample < 2:
            raise ValueError("unit is line or paragraph; documents and sample are at least 2")


class LineDedup(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.sample, self.dropped = config.sample, 0
        self.known: frozenset[int] = frozenset()

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        own = array.array("Q")  # the keys of each document, once
        for batch in _batches(sample):
            for _, _, keys in self._units(batch):
                own.extend(set(keys))
        keys_K, count_K = np.unique(np.frombuffer(own, np.uint64), return_counts=True)
        return {"common_lines": keys_K[(count_K >= self.config.documents) & (keys_K > 0)]}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.known = frozenset(arrays["common_lines"].tolist())

    def _units(self, documents: Sequence[Document]) -> Iterator[tuple[Document, list[str], list[int]]]:
        """Each document with its units in order, each with the space behind it, and their keys; 0: too short to count.
        The keys of all of them are computed at once."""
        split = [self._split(d.text) for d in documents]
        stripped = [part.strip() for parts in split for part in parts]
        counted = [i for i, unit in enumerate(stripped) if len(unit) >= self.config.shortest]
        keys_U = np.zeros(len(stripped), np.uint64)
        if counted:
            keys_U[counted] = keys_of([stripped[i] for i in counted])
        keys, at = keys_U.tolist(), 0
        for document, parts in zip(documents, split, strict=True):
            yield document, parts, keys[at : at + len(parts)]
            at += len(parts)

    def _split(self, text: str) -> list[str]:
        if self.config.unit == "line" and not _OTHER_ENDS.search(text):
            return text.splitlines(keepends=True)  # lines end at line feeds alone: the interpreter's own way is right
        parts = (_LINE if self.config.unit == "line" else _PARAGRAPH).split(text)
        return ["".join(parts[at : at + 2]) for at in range(0, len(parts), 2)]

    def run(self, documents: Iterable[Document]) -> Iterator[Document | Drop]:
        if not self.loaded:
            documents = list(documents)
            self.load(self.fit(sampled(documents, self.sample)))
        for batch in _batches(documents):
            for document, units, keys in self._units(batch):
                yield self._left(document, units, keys)

    def each(self, document: Document) -> Iterable[Document | Drop]:
        return self.run([document])

    def _left(self, document: Document, units: list[str], keys: list[int]) -> Document | Drop:
        seen: set[int] = set()
        kept = []
        for unit, key in zip(units, keys, strict=True):
            if key and (key in self.known or (self.config.within and key in seen)):
                continue
            seen.add(key)
            kept.append(unit)
        dropped = len(units) - len(kept)
        self.dropped += dropped
        if not dropped:
            return document
        text = "".join(kept).strip("\n")
        if not text.strip():
            return Drop(document.id, "all-duplicate", f"all of {dropped} {self.config.unit}s stand elsewhere too")
        return dataclasses.replace(document, text=text)

    def close(self) -> dict[str, float]:
        return {f"{self.config.unit}s_dropped": self.dropped}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def keys_of(texts: Sequence[str]) -> np.ndarray:
    """uint64 [N]: a hash of each text's words, without case, digits and punctuation; never 0."""
    together = "\n".join(texts).translate(_digits()).lower()
    lengths = [len(text) + 1 for text in texts]
    if len(together) + 1 != sum(lengths):  # few letters have a lower case of another length
        lengths = [len(text.lower()) + 1 for text in texts]
    flat_W, _, starts_W = _words(together)
    ends_N = np.searchsorted(starts_W, np.cumsum(lengths))  # words up to the end of each text
    counts_N = np.diff(ends_N, prepend=0)
    first_N = np.cumsum(counts_N) - counts_N
    number_W = np.arange(len(flat_W)) - np.repeat(first_N, counts_N)
    # `words.combine` of every row of words at once: sum of mix(w_k + k + 1) p^(K - 1 - k)
    power = powers(max(1 << 12, 1 << int(counts_N.max()).bit_length()))[0]
    terms_W = mix(flat_W + number_W.astype(np.uint64) + np.uint64(1))
    terms_W *= power[np.repeat(counts_N, counts_N) - 1 - number_W]
    sums_N = np.zeros(len(texts), np.uint64)
    some_N = counts_N > 0
    sums_N[some_N] = np.add.reduceat(terms_W, first_N[some_N]) if some_N.any() else 0
    return np.maximum(mix(sums_N), np.uint64(1))


@functools.cache
def _digits() -> dict[int, str]:
    """Every digit as a space, for `str.translate`."""
    return {i: " " for i in range(0x20000) if chr(i).isdigit()}  # none stands beyond
