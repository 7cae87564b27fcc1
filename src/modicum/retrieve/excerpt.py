"""The excerpt of a passage that best matches a question: consecutive sentences, or lines of code, in a token limit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from modicum.data.terms import tokenize

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9`*])")


def excerpt(text: str, question: str, limit: int, count: Callable[[str], int]) -> str:
    """The run of sentences, at most `limit` tokens, that shares most of the question's terms; all of it if it fits.

    A line of several sentences may be cut between them. A term counts once, so a run that covers the question beats
    one that repeats a word; the earliest wins a tie.
    """
    text = text.strip()
    if count(text) <= limit:
        return text
    sentences = [sentence for line in text.splitlines(keepends=True) for sentence in _sentences(line, limit, count)]
    wanted = set(tokenize(question))
    terms = [wanted.intersection(tokenize(sentence)) for sentence in sentences]
    sizes = [count(sentence) for sentence in sentences]
    best, best_score, end, size = (0, 1), -1, 0, 0
    for start in range(len(sentences)):
        while end < len(sentences) and size + sizes[end] <= limit:
            size += sizes[end]
            end += 1
        score = len(set().union(*terms[start:end])) if end > start else -1
        if score > best_score:
            best, best_score = (start, end), score
        size -= sizes[start] if end > start else 0
        end = max(end, start + 1)
    return "".join(sentences[best[0] : best[1]]).strip()


def _sentences(line: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    """Sentences of a line, each with the white space after it; one beyond `limit` is cut, at spaces if it can be."""
    begin = 0
    for end in [m.end() for m in _SENTENCE.finditer(line)] + [len(line)]:
        sentence, begin = line[begin:end], end
        while sentence and count(sentence) > limit:
            cut = len(sentence)
            while cut > 1 and count(sentence[:cut]) > limit:
                cut = cut * 2 // 3
            space = sentence.rfind(" ", cut // 2, cut)
            cut = space + 1 if space > 0 else cut
            yield sentence[:cut]
            sentence = sentence[cut:]
        if sentence:
            yield sentence
