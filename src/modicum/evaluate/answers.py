"""Short answers graded: exact match and word F1 as SQuAD defines them, on the answer that a reply's sentence gives.

A model that is asked for a value replies with a sentence ("The default value of `indent` is None."). `short_answer`
takes the answer out of it by rule, from the question and the reply alone: it knows nothing of
the accepted answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.data.python_source import first_sentence
from modicum.evaluate.compare import paired
from modicum.evaluate.tasks.generate import squad_normal, word_f1

FIGURES = ("exact", "f1", "contains")
RESAMPLES = 2000
Z = 1.959964  # of a two-sided 95% interval

_CITATION = re.compile(r"\s*\[\d{1,3}(?:\s*[,;]\s*\d{1,3})*\]")
_LABEL = re.compile(r"^(?:short )?answer\s*:\s*", re.IGNORECASE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A sentence's subject may use these beside the question's own words.
_FUNCTION_WORDS = _words(
    "it this that there which what who whom whose when where why how of in on at to for from by with as and its "
    "answer default value parameter function method class exception name called"
)
_VERBS = _words(
    "is are was were be been being raises raise returns return derives derived inherits equals has have had does did"
)
_AFTER_VERB = _words("from to as by a an the")  # "derives from", "is set to"


def short_answer(question: str, reply: str) -> str:
    """The answer that the first sentence of a reply gives.

    Citations and a leading "Answer:" go. Where the sentence begins by repeating the question ("The default value of
    `x` is 5 if ..."), that is, its words up to a verb are all the question's own or function words, the answer is what
    follows the verb, without a tail that repeats the question again; otherwise it is the whole sentence.
    """
    lines = [line for line in _CITATION.sub("", reply).strip().splitlines() if line.strip()]
    sentence = _LABEL.sub("", first_sentence(lines[0])[0]).strip() if lines else ""
    words = sentence.split()
    plain = [squad_normal(word) for word in words]
    question_words = set(squad_normal(question).split())
    echo = question_words | _FUNCTION_WORDS | _VERBS | {""}
    start = 0
    for position, word in enumerate(plain):
        if word not in echo:
            break
        if word in _VERBS:
            start = position + 1
    if not start or start == len(words):
        return sentence
    while start < len(words) - 1 and words[start].lower() in _AFTER_VERB:
        start += 1
    end = len(words)
    while end > start + 1 and plain[end - 1] in echo:
        end -= 1
    tail = set(plain[end:]) & question_words
    return " ".join(words[start : end if tail else len(words)])


def grade(question: str, reply: str, answers: Sequence[str]) -> dict[str, float]:
    """exact and f1 of the short answer against the best of `answers`; contains: one of them stands in the reply.

    All three compare what `squad_normal` leaves: lower case, no punctuation, no articles (Rajpurkar et al. 2016,
    arXiv:1606.05250, section 6.1).
    """
    if not answers:
        raise UserError(f"{question!r} has no accepted answer, so a reply to it cannot be graded; give one or more")
    extracted, whole = squad_normal(short_answer(question, reply)), squad_normal(_CITATION.sub("", reply))
    wanted = [squad_normal(answer) for answer in answers]
    return {
        "exact": float(extracted in wanted),
        "f1": max(word_f1(extracted, w) for w in wanted),
        "contains": float(any(f" {w} " in f" {whole} " for w in wanted if w)),
    }


def figures(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """{figure: {value, low, high}} with 95% intervals: Wilson's for fractions of questions, bootstrap for F1."""
    scores = {}
    for name in FIGURES:
        values = [row[name] for row in rows]
        bounds = bootstrap(values) if name == "f1" else wilson(int(sum(values)), len(values))
        scores[name] = {"value": float(np.mean(values)), "low": bounds[0], "high": bounds[1]}
    return scores


def comparisons(arms: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Every later arm minus every earlier one, question by question: {arm, against, figure, difference, low, high}."""
    names = list(arms)
    return [
        {"arm": b, "against": a, "figure": figure}
        | paired([row[figure] for row in arms[b]], [row[figure] for row in arms[a]])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for figure in FIGURES
    ]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% interval of a fraction (Wilson 1927, JASA 22): still an interval where no question or all are answered."""
    if not 0 <= hits <= n or n < 1:
        raise UserError(f"{hits} of {n} is not a fraction of one question or more")
    p = hits / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% interval of a mean by the percentiles of resampled means."""
    values_N = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = values_N[rng.integers(len(values_N), size=(RESAMPLES, len(values_N)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
