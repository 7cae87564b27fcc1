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

from modicum.data.document import Document, Drop
from modicum.data.rules import duplicates, words
from modicum.data.steps import Step

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
        spoken = [w for w in words_N if any(c.isalnum() or c == "_" for c in w)]
        if len(spoken) < config.min_words:
            yield "too-short", f"{len(spoken)} words"
        if len(spoken) > config.max_words:
            yield "too-long", f"{len(spoken)} words"
        if not spoken:
            return
        length = sum(map(len, spoken)) / len(spoken)
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
        letters = sum(any(map(str.isalpha, w)) for w in words_N) / n
        if letters < 0.8:
            yield "few-letters", f"{letters:.0%} of words have a letter"
        if len(STOP_WORDS.intersection(words_N)) < config.stop_words:
            yield "few-stop-words", f"{len(STOP_WORDS.intersection(words_N))} of the eight"


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
    for n, bound in TOP.items():
        grams = Counter(" ".join(words_N[i : i + n]) for i in range(len(words_N) - n + 1))
        if grams:
            gram, count = grams.most_common(1)[0]
            if len(gram) * count / len(text) > bound:
                yield "top-ngram", f"{len(gram) * count / len(text):.0%} of characters, n = {n}"
    for n, bound in DUPLICATE.items():
        fraction = repeated(words_N, n) / len(text)
        if fraction > bound:
            yield "duplicate-ngrams", f"{fraction:.0%} of characters, n = {n}"


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
