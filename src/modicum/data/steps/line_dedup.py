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

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.steps import Step
from modicum.data.words import combine, mix, word_hashes

_PARAGRAPH, _LINE = re.compile(r"(\n[^\S\n]*\n\s*)"), re.compile(r"(\n)")


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
        self.sample, self.common, self.dropped = config.sample, np.zeros(0, np.uint64), 0

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        own = [np.unique(np.array([key for _, key in self._units(d.text) if key], np.uint64)) for d in sample]
        keys, count = np.unique(np.concatenate(own), return_counts=True)
        return {"common_lines": keys[count >= self.config.documents]}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.common = arrays["common_lines"]

    def _units(self, text: str) -> Iterator[tuple[str, int]]:
        """(unit with the space behind it, its key) of a text, in order; 0: too short to count."""
        parts = (_LINE if self.config.unit == "line" else _PARAGRAPH).split(text)
        for at in range(0, len(parts), 2):
            unit = parts[at].strip()
            yield "".join(parts[at : at + 2]), key_of(unit) if len(unit) >= self.config.shortest else 0

    def each(self, document: Document) -> Iterable[Document | Drop]:
        seen: set[int] = set()
        kept, dropped = [], 0
        for unit, key in self._units(document.text):
            again = self.config.within and key in seen
            if key and (again or self._common(key)):
                dropped += 1
                continue
            if key:
                seen.add(key)
            kept.append(unit)
        self.dropped += dropped
        text = "".join(kept).strip("\n")
        if not dropped:
            yield document
        elif not text.strip():
            yield Drop(document.id, "all-duplicate", f"all of {dropped} {self.config.unit}s stand elsewhere too")
        else:
            yield dataclasses.replace(document, text=text)

    def _common(self, key: int) -> bool:
        at = int(np.searchsorted(self.common, np.uint64(key)))
        return at < len(self.common) and int(self.common[at]) == key

    def close(self) -> dict[str, float]:
        return {f"{self.config.unit}s_dropped": self.dropped}


def key_of(text: str) -> int:
    """A hash of the words, without case, digits and punctuation; never 0."""
    words, _ = word_hashes("".join(" " if c.isdigit() else c for c in text))
    whole = combine(words[None]) if len(words) else mix(np.zeros(1, np.uint64))
    return int(whole[0]) or 1
