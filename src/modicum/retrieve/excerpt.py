"""The part of a passage that bears on a question: a run of whole sentences, or lines of code, within a token limit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from modicum.retrieve.bm25 import tokenize

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9`*])")


def excerpt(text: str, question: str, limit: int, count: Callable[[str], int]) -> str:
    """The run of sentences, at most `limit` tokens, that shares most of the question's terms; all of it if it fits.

    A line of several sentences may be cut between them. A term counts once, so a run that covers the question beats
    one that repeats a word; the earliest wins a tie.
    """
    text = text.strip()
    if count(text) <= limit:
        return text
    parts = [part for line in text.splitlines(keepends=True) for part in _parts(line, limit, count)]
    wanted = set(tokenize(question))
    terms = [wanted.intersection(tokenize(part)) for part in parts]
    sizes = [count(part) for part in parts]
    best, best_score, end, size = (0, 1), -1, 0, 0
    for start in range(len(parts)):
        while end < len(parts) and size + sizes[end] <= limit:
            size += sizes[end]
            end += 1
        score = len(set().union(*terms[start:end])) if end > start else -1
        if score > best_score:
            best, best_score = (start, end), score
        size -= sizes[start] if end > start else 0
        end = max(end, start + 1)
    return "".join(parts[best[0] : best[1]]).strip()


def _parts(line: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    """Sentences of a line, each with the white space after it; one beyond `limit` is cut, at spaces if it can be."""
    begin = 0
    for end in [m.end() for m in _SENTENCE.finditer(line)] + [len(line)]:
        part, begin = line[begin:end], end
        while part and count(part) > limit:
            cut = len(part)
            while cut > 1 and count(part[:cut]) > limit:
                cut = cut * 2 // 3
            space = part.rfind(" ", cut // 2, cut)
            cut = space + 1 if space > 0 else cut
            yield part[:cut]
            part = part[cut:]
        if part:
            yield part
