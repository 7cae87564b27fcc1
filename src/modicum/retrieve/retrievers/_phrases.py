"""Named phrases of a text and the facts that join them, by rules: no model, no tokens, the same result every time.

A phrase is a run of capitalised words ("University of Vienna"), a year, a quoted text or an identifier. A fact joins
two phrases that follow each other in a sentence, with the words between as its relation, and the passage's title (a
short first line) with every phrase of the passage: passages seldom repeat what they are about. One word that begins a
sentence is a phrase only where the passage has it capitalised inside a sentence or in its title: sentences of
documentation begin with verbs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

JOINING = {"of", "the", "de", "la", "von", "van", "der", "&", "du", "del", "di"}
# Capitalised only because a sentence begins with them.
_COMMON = (
    "a an and as at but by for from he her his how if in is it its of on one or she so some such that the their then "
    "there these they this those to was we were what when where which while who whose why with you your are can could "
    "did do does has have had i may my no not our should than will would name both between during after before"
)
COMMON = frozenset(_COMMON.split())
TITLE_WORDS = 12
_TOKEN = re.compile(r"\"[^\"\n]{2,80}\"|“[^”\n]{2,80}”|[^\W\d_][\w'’.-]*|\d+|\S")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“])|\n+")
_EDGE = re.compile(r"^[^\w]+|[^\w]+$")
_IDENTIFIER = re.compile(r"\w*[a-z]\w*_\w+|\w+\.[a-z]\w+")


@dataclass(frozen=True)
class Facts:
    """phrases: every named phrase, once. triples: (phrase, relation, phrase), as often as they are stated."""

    phrases: tuple[str, ...]
    triples: tuple[tuple[str, str, str], ...]


def normal(phrase: str) -> str:
    """Lower case, without article, possessives and punctuation at the edges: phrases are compared so."""
    words = [_EDGE.sub("", re.sub(r"['’]s\b", "", word)) for word in phrase.lower().split()]
    return " ".join(word for i, word in enumerate(words) if word and (i or word not in ("the", "a", "an")))


def phrases(sentence: str, names: Container[str] = ()) -> list[tuple[str, int, int]]:
    """(normalised phrase, start, end) of every named phrase of a sentence, in order.

    names: what may stand alone at the sentence's beginning; any other word there may be capitalised for that alone.
    """
    named: list[tuple[str, int, int]] = []
    run: list[re.Match[str]] = []  # capitalised words, joined by words of JOINING

    def initial(run: list[re.Match[str]], name: str) -> bool:
        word = run[0][0]
        begins = not sentence[: run[0].start()].strip(" \t*-#>")
        return begins and len(run) == 1 and word[1:] == word[1:].lower() and name not in names

    def close() -> None:
        while run and run[-1][0].lower() in JOINING:
            run.pop()
        while run and run[0][0].lower().strip(".") in COMMON:
            run.pop(0)
        if run and (name := normal(sentence[run[0].start() : run[-1].end()])) and not initial(run, name):
            named.append((name, run[0].start(), run[-1].end()))
        run.clear()

    for match in _TOKEN.finditer(sentence):
        word = match[0]
        if word[0].isupper():
            run.append(match)
            if word.endswith(".") and len(word) > 3:  # "Inc." ends a name, "J." does not
                close()
        elif run and word.lower() in JOINING:
            run.append(match)
        else:
            close()
            year = word.isdigit() and len(word) == 4
            if (year or word[0] in '"“' or _IDENTIFIER.fullmatch(word.rstrip("."))) and (name := normal(word)):
                named.append((name, match.start(), match.end()))
    close()
    return named


def extract(text: str) -> Facts:
    """The facts of a passage."""
    title, body = _titled(text)
    names: dict[str, None] = dict.fromkeys([title] if title else [])
    triples: list[tuple[str, str, str]] = []
    parts = list(sentences(body))
    inner = {word for part in parts for name, _, _ in phrases(part) for word in (name, *name.split())}
    inner.update((title, *title.split()))
    for sentence in parts:
        inside = phrases(sentence, inner)
        names.update(dict.fromkeys(name for name, _, _ in inside))
        for (a, _, end), (b, start, _) in itertools.pairwise(inside):
            if a != b:
                triples.append((a, " ".join(sentence[end:start].split()), b))
        if title:
            triples += [(title, "", name) for name, _, _ in inside if name != title]
    return Facts(tuple(names), tuple(triples))


def sentences(text: str) -> Iterator[str]:
    yield from (part for part in _SENTENCE.split(text) if part.strip())


def _titled(text: str) -> tuple[str, str]:
    """(normalised title, the rest): the first line, if it is short, no sentence, and something follows."""
    first, _, rest = text.strip().partition("\n")
    if rest.strip() and len(first.split()) <= TITLE_WORDS and not first.rstrip().endswith((".", "!", ",")):
        return normal(first), rest
    return "", text
