"""gopher: the published rules of MassiveText's filter, word for word: quality, then repetition.

    words in [50, 100000];  mean word length in [3, 10];  # or ellipses / words <= 0.1
    lines that begin with a bullet <= 90%, that end in an ellipsis <= 30%
    words with a letter >= 80%;  at least 2 of: the be to of and that have with
    duplicate paragraphs, lines <= 30%, their characters <= 20%
    characters of the top 2-, 3-, 4-gram <= 20, 18, 16%;  of duplicate 5- ... 10-grams <= 15, 14, 13, 12, 11, 10%

Rae et al. 2021, arXiv:2112.11446, section A1.1 and table A1. A document is dropped for the first rule that it breaks,
in this order. The step `quality` is the same idea made to serve several languages, code and short reference texts;
this one is for English prose and for comparison with others' corpora: its decisions are those of datatrove 0.10 on the
same words. Departs from it: words are runs of letters and digits, or of punctuation (`rules.words`), where datatrove
uses spaCy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.rules import duplicates, words
from modicum.data.steps import Step
from modicum.data.words import powers

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_PARAGRAPHS, _LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")


@dataclass(frozen=True, kw_only=True)
class Config:
    quality: bool = True  # the rules of counts
    repetition: bool = True  # the rules of what is said twice
    min_words: int = 50
    max_words: int = 100_000
    stop_words: int = 2  # of the eight


class Gopher(Step):
    config: Config

    def each(self, document: Document) -> Iterable[Document | Drop]:
        text = document.text
        first = next(self.reasons(text, words(text)), None)
        yield Drop(document.id, *first) if first else document

    def reasons(self, text: str, words_N: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(reason, figure) of every rule that is broken, in order."""
        if self.config.quality:
            yield from self._quality(text, words_N)
        if self.config.repetition:
            yield from repetition(text, words_N)

    def _quality(self, text: str, words_N: Sequence[str]) -> Iterator[tuple[str, str]]:
        config, n = self.config, len(words_N)
        mixed = [w for w in words_N if not w.isalpha()]
        marks = [w for w in mixed if is_mark(w)]
        spoken = n - len(marks)
        if spoken < config.min_words:
            yield "too-short", f"{spoken} words"
        if spoken > config.max_words:
            yield "too-long", f"{spoken} words"
        if not spoken:
            return
        length = (sum(map(len, words_N)) - sum(map(len, marks))) / spoken
        if not 3 <= length <= 10:
            yield "word-length", f"{length:.2f} characters a word"
        for name, count in (("hashes", text.count("#")), ("ellipses", text.count("...") + text.count("…"))):
            if count / n > 0.1:
                yield name, f"{count / n:.2f} a word"
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)
        if bullets > 0.9:
            yield "bullets", f"{bullets:.0%} of lines"
        ends = sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)
        if ends > 0.3:
            yield "ellipsis-lines", f"{ends:.0%} of lines"
        letters = (n - len(mixed) + sum(map(has_letter, mixed))) / n
        if letters < 0.8:
            yield "few-letters", f"{letters:.0%} of words have a letter"
        if len(STOP_WORDS.intersection(words_N)) < config.stop_words:
            yield "few-stop-words", f"{len(STOP_WORDS.intersection(words_N))} of the eight"


@lru_cache(maxsize=1 << 14)
def is_mark(word: str) -> bool:
    return not any(c.isalnum() or c == "_" for c in word)


@lru_cache(maxsize=1 << 14)
def has_letter(word: str) -> bool:
    return any(map(str.isalpha, word))


def repetition(text: str, words_N: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Table A1, shares of the characters of the whole text."""
    if not text:
        yield "empty", ""
        return
    for name, units in (("paragraphs", _PARAGRAPHS.split(text.strip())), ("lines", _LINES.split(text))):
        count, characters = duplicates(units)
        if count / len(units) > 0.3:
            yield f"duplicate-{name}", f"{count / len(units):.0%} of {name}"
        if characters / len(text) > 0.2:
            yield f"duplicate-{name}", f"{characters / len(text):.0%} of characters"
    spaced, joined = Grams(words_N, " "), Grams(words_N, "")
    for n, bound in TOP.items():
        if spaced.most(n) / len(text) <= bound:
            continue
        grams = Counter(" ".join(words_N[i : i + n]) for i in range(len(words_N) - n + 1))
        if grams:
            gram, count = grams.most_common(1)[0]
            if len(gram) * count / len(text) > bound:
                yield "top-ngram", f"{len(gram) * count / len(text):.0%} of characters, n = {n}"
    for n, bound in DUPLICATE.items():
        if joined.repeated(n) / len(text) <= bound:
            continue
        fraction = repeated(words_N, n) / len(text)
        if fraction > bound:
            yield "duplicate-ngrams", f"{fraction:.0%} of characters, n = {n}"


class Grams:
    """Hashes of the n-grams of words as they stand in the words joined by `mark`: an upper bound of what repeats.

    Different hashes are different strings. The same hash may stand for two strings, so what is bounded here is counted
    exactly where the bound does not settle it.
    """

    def __init__(self, words_N: Sequence[str], mark: str):
        points = np.frombuffer(mark.join(words_N).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        self.powers, self.inverses = powers(max(1 << 12, 1 << len(points).bit_length()))
        values = (points + np.uint64(1)) * self.powers[: len(points)]
        self.prefix = np.concatenate([[np.uint64(0)], np.cumsum(values, dtype=np.uint64)])
        lengths_N = np.fromiter(map(len, words_N), np.int64, len(words_N))
        self.starts_N = np.cumsum(lengths_N + len(mark)) - lengths_N - len(mark)
        self.ends_N = self.starts_N + lengths_N

    def hashes(self, n: int) -> np.ndarray:
        """uint64 [N - n + 1]."""
        starts, ends = self.starts_N[: len(self.starts_N) - n + 1], self.ends_N[n - 1 :]
        hashes: np.ndarray = (self.prefix[ends] - self.prefix[starts]) * self.inverses[starts]
        return hashes

    def repeated(self, n: int) -> int:
        """At least the characters of n-grams that stood before: of all, overlapping ones counted once."""
        if len(self.starts_N) < n:
            return 0
        hashes = self.hashes(n)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        again = np.sort(order[1:][ordered[1:] == ordered[:-1]])
        starts, ends = self.starts_N[again], self.ends_N[again + n - 1]
        return int((ends - np.maximum(starts, np.concatenate([[0], ends[:-1]]))).sum()) if len(again) else 0

    def most(self, n: int) -> int:
        """At least the characters of the most frequent n-gram, times how often it stands there."""
        if len(self.starts_N) < n:
            return 0
        ordered = np.sort(self.hashes(n))
        edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
        longest = int((self.ends_N[n - 1 :] - self.starts_N[: len(self.starts_N) - n + 1]).max())
        return int(np.diff(edges).max()) * longest


def repeated(words_N: Sequence[str], n: int) -> int:
    """Characters of n-grams that stood before, none counted twice: after one, the search goes on behind it."""
    seen: set[str] = set()
    at = total = 0
    while at < len(words_N) - n + 1:
        gram = "".join(words_N[at : at + n])
        if gram in seen:
            total += len(gram)
            at += n
        else:
            seen.add(gram)
            at += 1
    return total
