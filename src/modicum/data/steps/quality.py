"""quality: drop documents that are hardly language, or hardly code, by cheap counts.

Prose, each bound from Rae et al. 2021 (Gopher, arXiv:2112.11446, section A1.1 and table A1):

    words in [min_words, max_words];  mean word length in [3, 10] characters
    (# and ellipses) / words <= 0.1;  lines that start with a bullet <= 90%, that end with an ellipsis <= 30%
    words with a letter >= 80%;  at least two of the commonest words
    characters in duplicate lines, paragraphs <= 20%; such lines, paragraphs <= 30%
    characters in the top 2-, 3-, 4-gram <= 20, 18, 16%;  in duplicate 5..10-grams <= 15, 14, 13, 12, 11, 10%

Code, as Chen et al. 2021 (Codex, arXiv:2107.03374, section 3.1) and Kocetkov et al. 2022 (The Stack,
arXiv:2211.15533) filter it:

    longest line <= 1000, mean line <= 100 characters;  alphanumeric characters >= 25%;  not generated

Departs from Gopher: the commonest words of several languages count, not of English alone; bounds on word
length and letters rest where much is Han or kana, which need no spaces, and the one on common words
wherever most letters are not Latin;
repetition is only judged from `repetition_words` words on, because in short texts a single repeated
phrase exceeds the bounds; reference documentation (meta kind "reference", such as docstrings) repeats
itself by nature and is short, so that for it the bounds on repetition rest and `reference_words` do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.steps import Step
from modicum.data.words import ngrams, word_hashes

COMMON = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the be to of and that have with",
        "de": "der die das und ist nicht mit ein",
        "fr": "le la les et des est pas une",
        "es": "el los las que y una con para",
        "it": "il di che non per una con sono",
        "pt": "os que não uma com para mais da",
        "nl": "de het een van niet met zijn voor",
        "sv": "och att det som en på är med",
        "pl": "w nie na się że do jest z",
        "cs": "a se na je že do pro jako",
        "da": "og at det som en til er med",
        "fi": "ja on ei että se oli myös kun",
        "hu": "a az és hogy nem egy is meg",
        "ro": "și de la în cu nu este o",
        "tr": "ve bir bu için ile da de çok",
        "id": "yang dan di ini itu dengan untuk dari",
        "vi": "và của là có không một cho được",
    }.items()
}
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_BULLET = re.compile(r"^\s*[-*•‣·●▪]\s")
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated automatically|"
    r"this file (?:is|was) generated|generated from ['\"]|do not edit",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    min_words: int = 50
    max_words: int = 100_000
    stop_words: int = 2
    reference_words: int = 10
    repetition: bool = True
    repetition_words: int = 200
    max_line: int = 1000  # code: characters
    mean_line: float = 100.0  # code: characters
    alphanumeric: float = 0.25  # code: fraction of characters
    generated: bool = True  # code: drop files whose first lines say that they are generated


class Quality(Step):
    config: Config

    def each(self, document: Document) -> Iterable[Document | Drop]:
        if document.domain == "code":
            reasons = self._code(document.text)
        else:
            reasons = self._prose(document.text, document.meta.get("kind") == "reference")
        first = next(reasons, None)
        yield Drop(document.id, *first) if first else document

    def _code(self, text: str) -> Iterator[tuple[str, str]]:
        lines = text.split("\n")
        longest = max(map(len, lines))
        if longest > self.config.max_line:
            yield "long-line", f"a line of {longest} characters"
        mean = len(text) / len(lines)
        if mean > self.config.mean_line:
            yield "long-lines", f"{mean:.0f} characters a line"
        alphanumeric = sum(map(str.isalnum, text)) / len(text)
        if alphanumeric < self.config.alphanumeric:
            yield "few-letters", f"{alphanumeric:.0%} letters and digits"
        if self.config.generated and (match := _GENERATED.search("\n".join(lines[:5]))):
            yield "generated", match[0]

    def _prose(self, text: str, reference: bool) -> Iterator[tuple[str, str]]:
        config = self.config
        hashes, letters = word_hashes(text)
        words = text.split()
        unspaced = len(_UNSPACED.findall(text)) > 0.3 * sum(map(len, words))
        count = len(hashes) if unspaced else len(words)
        if count < (config.reference_words if reference else config.min_words):
            yield "too-short", f"{count} words"
        if count > config.max_words:
            yield "too-long", f"{count} words"
        if count and not unspaced:
            length = sum(map(len, words)) / count
            if not 3 <= length <= 10:
                yield "word-length", f"{length:.1f} characters a word"
            alphabetic = sum(any(map(str.isalpha, word)) for word in words) / count
            if alphabetic < 0.8:
                yield "few-letters", f"{alphabetic:.0%} of words have a letter"
            if config.stop_words and count >= config.min_words and _latin(text):
                seen = {word.lower().strip(".,;:!?()\"'") for word in words}
                most = max(len(seen & common) for common in COMMON.values())
                if most < config.stop_words:
                    yield "few-stop-words", f"{most} of the commonest words"
        if reference:
            return
        symbols = (text.count("#") + text.count("...") + text.count("…")) / max(count, 1)
        if symbols > 0.1:
            yield "symbols", f"{symbols:.2f} # or ellipses a word"
        lines = [line for line in text.split("\n") if line.strip()]
        bullets = sum(bool(_BULLET.match(line)) for line in lines) / max(len(lines), 1)
        if bullets > 0.9:
            yield "bullets", f"{bullets:.0%} of lines"
        ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines) / max(len(lines), 1)
        if ellipses > 0.3:
            yield "ellipses", f"{ellipses:.0%} of lines"
        if config.repetition and count >= config.repetition_words:
            yield from _repetition(text, lines, hashes, letters)


def _latin(text: str) -> bool:
    """Whether most letters at the beginning are Latin."""
    head = text[:2000].lower()
    return sum("a" <= c <= "z" for c in head) > 0.5 * sum(map(str.isalpha, head))


def _repetition(text: str, lines: list[str], hashes: np.ndarray, letters: np.ndarray) -> Iterator[tuple[str, str]]:
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    for name, units in (("lines", [line.strip() for line in lines]), ("paragraphs", paragraphs)):
        seen: set[str] = set()
        again = [u for u in units if u in seen or seen.add(u)]  # type: ignore[func-returns-value]
        if len(again) > 0.3 * len(units):
            yield f"duplicate-{name}", f"{len(again) / len(units):.0%} of {name}"
        fraction = sum(map(len, again)) / max(sum(map(len, units)), 1)
        if fraction > 0.2:
            yield f"duplicate-{name}", f"{fraction:.0%} of characters"
    total = max(int(letters.sum()), 1)
    for n, bound in {**TOP, **DUPLICATE}.items():
        if len(hashes) < n:
            return
        grams = ngrams(hashes, n)
        _, inverse, counts = np.unique(grams, return_inverse=True, return_counts=True)
        if counts.max() < 2:
            return  # longer ones do not repeat either
        if n in TOP:
            at = int(np.argmax(inverse == np.argmax(counts)))
            fraction = float(counts.max() * letters[at : at + n].sum() / total)
            name = "top-ngram"
        else:
            covered = _covered(np.flatnonzero(counts[inverse] > 1), n, len(hashes))
            fraction = float(letters[covered].sum() / total)
            name = "duplicate-ngrams"
        if fraction > bound:
            yield name, f"{fraction:.0%} of characters, n = {n}"


def _covered(starts: np.ndarray, n: int, count: int) -> np.ndarray:
    """bool [count]: words in at least one of the n-grams that begin at `starts`."""
    edges = np.zeros(count + 1, np.int64)
    edges[starts] += 1
    np.subtract.at(edges, starts + n, 1)
    return np.cumsum(edges[:-1]) > 0
