"""The sources of an answer: the numbers it cites itself, or attribution by word overlap where it cites none.

Small models seldom cite. `attribute` then compares words: a sentence of the answer is attributed to the source that
contains most of its content words (those that are neither function words nor the question's own), if it contains
enough of them. That shows where the words occur, which a reader can check, not what the model attended to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from modicum.data.terms import tokenize

SUPPORT = 0.7  # fraction of a sentence's content words that a source must contain

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_CITATION = re.compile(r"\[(\d{1,3}(?:\s*[,;]\s*\d{1,3})*)\]")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_FUNCTION_WORDS = frozenset(
    tokenize(
        "a an the this that these those it its he she they we you i his her their our your of in on at to from by for "
        "with as into about over under between and or but nor not no if when where which who whom whose what how why "
        "than then so such is are was were be been being am do does did has have had can could may might must shall "
        "should will would there here also only just very more most some any all each other another same one"
    )
)


def citations(text: str, n_sources: int) -> tuple[list[int], list[int]]:
    """(cited, unknown): numbers in square brackets outside code, by first mention; unknown ones name no source."""
    numbers = dict.fromkeys(
        int(number) for bracket in _CITATION.findall(_CODE.sub(" ", text)) for number in re.findall(r"\d+", bracket)
    )
    return [n for n in numbers if 1 <= n <= n_sources], [n for n in numbers if not 1 <= n <= n_sources]


def attribute(question: str, text: str, sources: Sequence[str]) -> list[int]:
    """Numbers (from 1) of the sources that contain the answer's content words, in the order of its sentences.

    A sentence without content words beyond the question's is compared by all its content words. Of equal sources the
    first is taken; a sentence that no source supports adds none.
    """
    terms = [set(tokenize(source)) for source in sources]
    question_terms = set(tokenize(question))
    supported: dict[int, None] = {}
    for sentence in _SENTENCE.split(_CITATION.sub("", text)):
        content = set(tokenize(sentence)) - _FUNCTION_WORDS
        content = (content - question_terms) or content
        if not content:
            continue
        support = [len(content & source_terms) / len(content) for source_terms in terms]
        best = max(support, default=0.0)
        if best >= SUPPORT:
            supported[support.index(best) + 1] = None
    return list(supported)
