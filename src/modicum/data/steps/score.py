"""score: give each document a quality between 0 and 1, and drop none.

For an order of the data by quality (`data.stream`, order="quality"). The mean of four fractions, each of which
published filters put a bound on; here they form a score instead of a decision:

    letters   words with a letter (code: letters and digits among what is not space)
    fresh     characters outside lines that stood there before
    variety   different words among the first `words`
    ends      lines that end as a sentence does (code: lines of at most `line` characters)

letters and fresh: Rae et al. 2021 (Gopher, arXiv:2112.11446, table A1); ends: Raffel et al. 2020 (C4,
arXiv:1910.10683, section 2.2); for code Chen et al. 2021 (Codex, arXiv:2107.03374, section 3.1). The mean is this
file's: no model was trained on anybody's judgement. A record's own number in "quality" is better where there is one,
and stays unless overwrite=true.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from modicum.data.document import Document, Drop
from modicum.data.steps import Step

ENDS = tuple(".!?:;\"'”’)]}。！？…")


@dataclass(frozen=True, kw_only=True)
class Config:
    words: int = 500  # of the beginning, for variety: all of a long text has few new words
    line: int = 100  # characters of a line of code that are readable
    overwrite: bool = False  # replace scores that documents came with

    def __post_init__(self) -> None:
        if self.words < 1 or self.line < 1:
            raise ValueError(f"words={self.words} and line={self.line} must be at least 1")


class Score(Step):
    config: Config

    def each(self, document: Document) -> Iterable[Document | Drop]:
        if document.quality is None or self.config.overwrite:
            score = self.score(document.text, document.domain == "code")
            document = dataclasses.replace(document, meta=document.meta | {"quality": round(score, 4)})
        yield document

    def score(self, text: str, code: bool) -> float:
        """The mean of the four fractions; 0 for a text without words."""
        words = text.split()
        if not words:
            return 0.0
        if code:
            letters = sum(map(str.isalnum, text)) / sum(map(len, words))
        else:
            letters = sum(any(map(str.isalpha, word)) for word in words) / len(words)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        fresh = sum(map(len, set(lines))) / sum(map(len, lines))
        head = [word.lower() for word in words[: self.config.words]]
        variety = len(set(head)) / len(head)
        if code:
            ends = sum(len(line) <= self.config.line for line in lines) / len(lines)
        else:
            ends = sum(line.endswith(ENDS) for line in lines) / len(lines)
        return (letters + fresh + variety + ends) / 4
