"""decontaminate: drop documents that hold a benchmark's text, by n-grams of words, or cut it out.

    hit     n words of a document in a row that stand in a row in a text of the targets, case and punctuation aside
    drop    the document, or with action=cut the span of the hit and `margin` characters on both sides

Brown et al. 2020, arXiv:2005.14165, appendix C: n = 13, 200 characters on both sides, and a document that falls into
more than ten parts is dropped whole. A target shorter than n words is looked for as a whole if it has at least
`shortest`. Departs from them: words are compared by 64-bit hashes, of which two differ by chance once in 10^12
documents; parts shorter than the margin are not kept. The detail of a drop names the span, in characters, and what
stands there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.steps import Step
from modicum.data.steps._selection import target_texts
from modicum.data.words import ngrams, word_hashes

NOT_MEASURABLE = "it drops what benchmarks hold, and the pool of the bench has none of them"
_WORD = re.compile(r"\w+")
MOST_PARTS = 10


@dataclass(frozen=True, kw_only=True)
class Config:
    targets: list[str] = field(default_factory=list)  # files of benchmarks: questions with their answers
    text_field: str = "text"  # of their records
    n: int = 13  # words
    shortest: int = 8  # words of a target that is looked for as a whole
    action: str = "drop"  # drop, cut
    margin: int = 200  # characters cut on both sides of a hit

    def __post_init__(self) -> None:
        if self.n < 2 or not 2 <= self.shortest <= self.n or self.action not in ("drop", "cut") or self.margin < 0:
            raise ValueError("n is at least 2, shortest lies in [2, n], action is drop or cut, margin is not negative")


TOY = Config(n=3, shortest=2)


class Decontaminate(Step):
    config: Config
    sample = 1  # nothing of the corpus itself is learnt

    def __init__(self, config: Config):
        super().__init__(config)
        self.index: dict[int, np.ndarray] = {}
        self.cut = 0

    def sources(self) -> Sequence[str]:
        return self.config.targets

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        """Sorted hashes of the targets' n-grams, by n: that of the knob, and those of shorter targets."""
        by_target = target_texts("decontaminate", self.config.targets, self.context, self.config.text_field)
        grams: dict[int, list[np.ndarray]] = {}
        for texts in by_target.values():
            for text in texts:
                words = hashes(text)
                size = min(self.config.n, len(words))
                if size >= self.config.shortest:
                    grams.setdefault(size, []).append(ngrams(words, size))
        return {f"ngrams_{size}": np.unique(np.concatenate(rows)) for size, rows in grams.items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.index = {int(name.removeprefix("ngrams_")): grams for name, grams in sorted(arrays.items())}

    def each(self, document: Document) -> Iterable[Document | Drop]:
        words = hashes(document.text)
        hit_N = np.zeros(len(words), bool)
        for size, grams in self.index.items():
            if len(words) >= size:
                own = ngrams(words, size)
                at = np.minimum(np.searchsorted(grams, own), len(grams) - 1)
                for start in np.flatnonzero(grams[at] == own).tolist():
                    hit_N[start : start + size] = True
        if not hit_N.any():
            yield document
            return
        spans = self.spans(document.text, hit_N)
        start, end = spans[0]
        detail = f"{len(spans)} spans, the first from character {start} to {end}: {document.text[start:end][:120]!r}"
        if self.config.action == "drop":
            yield Drop(document.id, "contaminated", detail)
            return
        parts = self._between(document.text, spans)
        if not parts or len(spans) > MOST_PARTS:
            yield Drop(document.id, "contaminated", detail)
            return
        self.cut += len(spans)
        yield dataclasses.replace(document, text="\n\n".join(parts))

    def spans(self, text: str, hit_N: np.ndarray) -> list[tuple[int, int]]:
        """(start, end) in characters of each run of words that hit."""
        words = [match.span() for match in _WORD.finditer(text)]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], hit_N, [False]]).astype(np.int8)))
        return [(words[int(a)][0], words[int(b) - 1][1]) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    def _between(self, text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
        """What is left between the spans and their margins."""
        margin, parts, at = self.config.margin, [], 0
        for start, end in [*spans, (len(text) + margin, 0)]:
            part = text[at : max(start - margin, at)].strip()
            if len(part) > margin:
                parts.append(part)
            at = max(at, end + margin)
        return parts

    def close(self) -> dict[str, float]:
        return {"spans_cut": self.cut}


def hashes(text: str) -> np.ndarray:
    """uint64 hashes of the words that `_WORD` gives."""
    words = _WORD.findall(text.lower())
    together, _ = word_hashes(" ".join(words))
    if len(together) == len(words):
        return together
    return np.array([_whole(word) for word in words], np.uint64)


def _whole(word: str) -> int:
    """One hash of a word, also where its characters count one by one elsewhere (Han, kana)."""
    parts, _ = word_hashes(word)
    return int(parts[0] if len(parts) == 1 else ngrams(parts, len(parts))[0]) if len(parts) else 0
