"""fineweb: the three rules that FineWeb adds to those of Gopher and C4.

    lines that end in punctuation       >= 12%
    lines of at most 30 characters      <= 67%
    characters of duplicate lines       <= 1%, of those without line ends
    line ends / words                   <= 0.3

Penedo et al. 2024, arXiv:2406.17557, section 3.6, with the thresholds of the authors' code. Decisions are those of
datatrove 0.10 on the same words. Departs from it: words as in the step `gopher`; what ends a line is by Unicode's
sentence terminals, of all scripts. For prose: code passes as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from modicum.data.document import Document, Drop
from modicum.data.rules import duplicates, terminals, words
from modicum.data.steps import Step


@dataclass(frozen=True, kw_only=True)
class Config:
    ends: float = 0.12  # share of lines that end in punctuation, at least
    short_lines: float = 0.67  # share of lines of at most `short` characters, at most
    short: int = 30
    duplicates: float = 0.01  # share of characters in lines that stood before, at most
    line_ends: float = 0.3  # a word, at most


class FineWeb(Step):
    config: Config

    def each(self, document: Document) -> Iterable[Document | Drop]:
        first = None
        if document.domain != "code":
            first = next(self.reasons(document.text, words(document.text)), None)
        yield Drop(document.id, *first) if first else document

    def reasons(self, text: str, words_N: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(reason, figure) of every rule that is broken, in order."""
        config = self.config
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            yield "empty", ""
            return
        ends = sum(line.endswith(terminals()) for line in lines) / len(lines)
        if ends < config.ends:
            yield "line-ends", f"{ends:.0%} of lines end in punctuation"
        short = sum(len(line) <= config.short for line in lines) / len(lines)
        if short > config.short_lines:
            yield "short-lines", f"{short:.0%} of lines"
        fraction = duplicates(lines)[1] / len(text.replace("\n", ""))
        if fraction > config.duplicates:
            yield "duplicate-lines", f"{fraction:.1%} of characters"
        if text.count("\n") / max(len(words_N), 1) > config.line_ends:
            yield "list", f"{text.count(chr(10)) / max(len(words_N), 1):.2f} line ends a word"
