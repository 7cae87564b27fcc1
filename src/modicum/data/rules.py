"""What rules about a text's words, lines and sentences count with; shared by the filters that others have published."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
_SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$)")


def words(text: str) -> list[str]:
    """Runs of letters and digits, with apostrophes inside, and runs of punctuation, as they are written."""
    return _WORDS.findall(text)


def sentences(text: str) -> int:
    """How many sentences end in a line that has at least one; its last may lack the mark."""
    ends = len(_SENTENCE_END.findall(text))
    rest = _SENTENCE_END.split(text)[-1].strip()
    return ends + bool(rest)


def duplicates(units: Iterable[str]) -> tuple[int, int]:
    """(units that stood before, their characters)."""
    seen: set[str] = set()
    count = characters = 0
    for unit in units:
        if unit in seen:
            count += 1
            characters += len(unit)
        else:
            seen.add(unit)
    return count, characters


@cache
def terminals() -> tuple[str, ...]:
    """Marks that end a sentence, of all scripts: Unicode's property Sentence_Terminal."""
    import regex

    return tuple(regex.findall(r"\p{STerm}", "".join(map(chr, (*range(0x21, 0xD800), *range(0xE000, 0x20000))))))
