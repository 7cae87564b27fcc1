"""What rewriters have in common: passages of a text, prefaces of replies, and checks of a reply against its source.

Lengths are counted in words and marks: a generator's own tokens are somewhat more, and another generator's others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from modicum.data.terms import tokenize

_TOKEN = re.compile(r"\w+|[^\w\s]")
_SENTENCE = re.compile(r".*?[.!?\u2026\u3002\uff01\uff1f]+[\"'\u201d\u2019)\]]*(?:\s+|$)|.+$", re.DOTALL)
_LINE = re.compile(r"[^\n]*\n+|[^\n]+$")
_WORD = re.compile(r"\S+\s*|\s+")
_PREFACE = re.compile(
    r"""^\s*(?:
        (?:sure|certainly|of\ course|absolutely|okay|ok|great|yes|no\ problem)(?:[,!.:]\s*|\s*$)
      | here(?:'s|\u2019s|\ is|\ are|\ you\ go)\b[^\n:]{0,160}:\s*
      | (?:below|the\ following)\b[^\n:]{0,160}:\s*
      | (?:\*\*|\#+\ *)?(?:paraphrased?|rephrased?|rewritten|revised|improved|simplified|translated)
        (?:\ (?:text|version|passage|paragraph|sentence|article))?(?:\*\*)?\s*:(?:\*\*)?\s*
      | the\ (?:paraphrased?|rephrased?|rewritten|revised|improved|simplified)\b[^\n:]{0,80}:\s*
      | i\ (?:have|'ve|will|can|\u2019ve)\ [^\n:]{0,100}:\s*
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_QUOTES = (("\u201c", "\u201d"), ('"', '"'), ("\u00ab", "\u00bb"), ("'", "'"))


def count(text: str) -> int:
    """Words and marks."""
    return len(_TOKEN.findall(text))


def sentences(text: str) -> list[str]:
    """Sentences with the space after them; joined they are the text."""
    return _SENTENCE.findall(text)


def lines(text: str) -> list[str]:
    """Lines with their ends; joined they are the text."""
    return _LINE.findall(text)


def head(text: str, most: int) -> str:
    """The beginning of `text` with at most `most` words and marks."""
    last = 0
    for number, match in enumerate(_TOKEN.finditer(text)):
        if number == most:
            return text[:last]
        last = match.end()
    return text


def passages(text: str, most: int, by_lines: bool = False) -> list[str]:
    """Consecutive passages of at most `most` words and marks that end where sentences do, or lines; joined they are
    the text. A sentence that is longer is cut between words, a word that is longer between its parts."""
    units = [part for line in lines(text) for part in _within(line, most)] if by_lines else _within(text, most)
    out: list[str] = []
    size = most
    for unit in units:
        n = count(unit)
        if out and size + n <= most:
            out[-1] += unit
            size += n
        else:
            out.append(unit)
            size = n
    return out


def _within(text: str, most: int) -> list[str]:
    if count(text) <= most:
        return [text]
    units: list[str] = []
    for sentence in sentences(text):
        if count(sentence) <= most:
            units.append(sentence)
            continue
        for word in _WORD.findall(sentence):
            while count(word) > most:
                first = head(word, most)
                units.append(first)
                word = word[len(first) :]
            units.append(word)
    return units


def plain(reply: str) -> str:
    """A reply without what it says of itself: prefaces, and quotes around the whole."""
    text = reply.strip()
    for _ in range(3):
        shorter = _PREFACE.sub("", text, count=1).strip()
        if shorter == text or not shorter:
            break
        text = shorter
    for opening, closing in _QUOTES:
        if len(text) > 2 and text[0] == opening and text[-1] == closing and opening not in text[1:-1]:
            return text[1:-1].strip()
    return text


def tagged(reply: str, tag: str) -> str | None:
    """The text of the last complete `<tag>...</tag>`; None where there is none, or an empty one."""
    matches = re.findall(rf"<{tag}>((?:(?!<{tag}>).)*?)</{tag}>", reply, re.DOTALL | re.IGNORECASE)
    return (matches[-1].strip() or None) if matches else None


def overlap(a: str, b: str) -> float:
    """Cosine of the counts of two texts' terms."""
    x, y = Counter(tokenize(a)), Counter(tokenize(b))
    product = sum(n * y[term] for term, n in x.items())
    return product / max(math.sqrt(sum(n * n for n in x.values()) * sum(n * n for n in y.values())), 1e-12)


def refused(
    source: str, reply: str, prompt: str, *, shortest: float, longest: float, least_overlap: float
) -> tuple[str, str] | None:
    """(reason, detail) of a reply that cannot stand for its source; None where nothing speaks against it.

    Its length, a 4-gram three times over that the source repeats less often, six words of the prompt's instruction in
    a row, terms of other matters.
    """
    ratio = count(reply) / max(count(source), 1)
    if not shortest <= ratio <= longest:
        return "length", f"{ratio:.2f} of the original's, allowed {shortest} to {longest}"
    most, gram = _most_repeated(reply, 4)
    if most >= 3 and most > _most_repeated(source, 4)[0]:
        return "repetition", f"{' '.join(gram)!r} {most} times"
    ours = _grams(reply, 6) & (_grams(prompt, 6) - _grams(source, 6))
    if ours:
        return "instruction", f"{' '.join(sorted(ours)[0])!r} comes from the prompt"
    same = overlap(source, reply)
    if same < least_overlap:
        return "other-content", f"cosine of terms {same:.2f}, at least {least_overlap}"
    return None


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _most_repeated(text: str, n: int) -> tuple[int, Sequence[str]]:
    words = text.lower().split()
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if not counts:
        return 0, ()
    gram, most = counts.most_common(1)[0]
    return most, gram
