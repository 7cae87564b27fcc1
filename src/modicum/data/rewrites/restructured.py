"""restructured: signals that a text already holds, written as prompts with answers, beside the raw text.

    d' = template(prompt(s), answer(s))        s in signals(d), a template drawn for each

Six signals are mined by rule: a document's title, a section's heading, its topic (the domain), the step that follows in
a numbered or bulleted list, the definition of a term, and a documented function's docstring. Each has several templates
of two kinds, *generation* (the answer is written out) and *choice* (options are listed, the right one is named); where
the right option stands is drawn. An answer never stands in its prompt, other than among options. No generator is asked.

Yuan and Liu 2022, "reStructured Pre-training" (arXiv:2206.11147): 29 signal types of ten mines. Departs from it: six
signals that any corpus of text has; a decoder; held-out documents are chosen by origin, so that raw text and prompts
made of it fall on one side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.passages import is_python, sections
from modicum.data.python_source import functions
from modicum.data.rewrites import Rewriter, Rounds

CLAIM = {
    "figure": "better than T0 on 52 of 55 data sets",
    "where": "abstract",
    "scale": "11B parameters, 46.9M samples",
}
LETTERS = "ABCDEFGH"
# Templates by signal: {source} and {answer}; {options} in those that choose. `read` inverts them.
GENERATION: dict[str, tuple[str, ...]] = {
    "title": (
        "TEXT: {source}\nQUERY: What is a good title of this text?\nANSWER: {answer}",
        "Give the following text a title.\n\n{source}\n\nTitle: {answer}",
        "{source}\n\nThe title of the text above is: {answer}",
    ),
    "heading": (
        "TEXT: {source}\nQUERY: Under which heading does this section stand?\nANSWER: {answer}",
        "Find a heading for this section.\n\n{source}\n\nHeading: {answer}",
        "{source}\n\nThis section is about: {answer}",
    ),
    "topic": (
        "TEXT: {source}\nQUERY: Of what kind is this text?\nANSWER: {answer}",
        "{source}\n\nThe text above belongs to the domain: {answer}",
        "Name the kind of this text.\n\n{source}\n\nKind: {answer}",
    ),
    "next-step": (
        "STEPS: {source}\nQUERY: What comes next?\nANSWER: {answer}",
        "These steps were done:\n{source}\n\nThe next step is: {answer}",
        "{source}\n\nAfter that: {answer}",
    ),
    "definition": (
        "TERM: {source}\nQUERY: What is it?\nANSWER: {answer}",
        "Define the term {source}.\n\nDefinition: {answer}",
        "What is meant by {source}?\n\nIt is {answer}",
    ),
    "docstring": (
        "CODE: {source}\nQUERY: What does this function do?\nANSWER: {answer}",
        "Describe the function in a sentence.\n\n{source}\n\nDescription: {answer}",
        "{source}\n\nIn short: {answer}",
    ),
}
CHOICE: dict[str, tuple[str, ...]] = {
    signal: (
        f"TEXT: {{source}}\nQUERY: {question}\nOPTIONS:\n{{options}}\nANSWER: {{answer}}",
        f"{{source}}\n\n{question}\n{{options}}\n\nThe right one is {{answer}}",
    )
    for signal, question in (
        ("heading", "Which of these is the section's heading?"),
        ("topic", "Of which kind is this text?"),
        ("next-step", "Which of these comes next?"),
    )
}
_STEP = re.compile(r"^[ \t]*(?:\d+[.)]|[-*\u2022])[ \t]+(\S.*)$", re.MULTILINE)
_DEFINITION = re.compile(
    r"(?:^|(?<=[.!?]\s))(?:(?:A|An|The)\s)?([A-Z]?[\w-]+(?:\s[\w-]+){0,2})\s(?:is|are)\s((?:a|an|the)\s[^.!?\n]{20,200})[.!?]",
    re.MULTILINE,
)
_PRONOUNS = {"it", "this", "that", "there", "he", "she", "they", "which", "what", "these", "those", "one", "who"}


@dataclass(frozen=True, kw_only=True)
class Config:
    signals: list[str] = field(default_factory=lambda: list(GENERATION))
    topics: list[str] = field(default_factory=list)  # all domains, for choices of the topic; empty: none
    most: int = 4  # prompts made of one document
    words: int = 120  # of a source text in a prompt, at most

    def __post_init__(self) -> None:
        unknown = [s for s in self.signals if s not in GENERATION]
        if unknown:
            raise ValueError(f"signals={unknown} are none of {', '.join(GENERATION)}")
        if self.most < 1 or self.words < 8:
            raise ValueError("most is at least 1, words at least 8")


@dataclass(frozen=True)
class Signal:
    """kind: one of `GENERATION`. others: wrong options, none where it cannot be a choice."""

    kind: str
    source: str
    answer: str
    others: tuple[str, ...] = ()


class Restructured(Rewriter):
    config: Config
    generates = False

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        mined = [s for s in signals(document, self.config) if s.kind in self.config.signals]
        order = sorted(int(i) for i in rng.permutation(len(mined))[: self.config.most])
        out: list[Document | Drop] = [document]
        for k, i in enumerate(order):
            out.append(self.made(document, written(mined[i], rng), f"{k}", domain="restructured"))
        return out
        yield


def signals(document: Document, config: Config) -> Iterator[Signal]:
    """The signals of a document, in its order; those whose answer stands in the source are left out."""
    for signal in _mined(document, config):
        if signal.answer.strip() and signal.source.strip() and signal.answer.lower() not in signal.source.lower():
            yield signal


def _mined(document: Document, config: Config) -> Iterator[Signal]:
    if is_python(document):
        for function in functions(document):
            if function.summary and "(" in function.signature:
                yield Signal("docstring", _cut(function.signature, config.words), function.summary)
        return
    text = document.text
    title = str(document.meta.get("title", "")).strip()
    body = text.replace(title, "", 1).strip() if title else text
    if title and "\n" not in title:
        yield Signal("title", _cut(body, config.words), title)
    parts = [s for s in sections(document) if s.heading and len(s.body.split()) >= 8]
    headings = list(dict.fromkeys(s.heading for s in parts))
    for section in parts:
        others = tuple(h for h in headings if h != section.heading)
        yield Signal("heading", _cut(section.body, config.words), section.heading, others)
    if document.domain and len(text.split()) >= 20:
        others = tuple(t for t in config.topics if t != document.domain)
        yield Signal("topic", _cut(text, config.words), document.domain, others)
    steps = [s.strip() for s in _STEP.findall(text)]
    for at in range(2, len(steps)):
        before = "\n".join(f"{k + 1}. {step}" for k, step in enumerate(steps[at - 2 : at]))
        others = tuple(dict.fromkeys(s for s in steps[at + 1 :] if s != steps[at]))
        yield Signal("next-step", _cut(before, config.words), steps[at], others)
    for term, what in _DEFINITION.findall(text):
        if term.split()[0].lower() not in _PRONOUNS:
            yield Signal("definition", term, what)


def _cut(text: str, words: int) -> str:
    """The beginning of a text on one line: a line break would end a template's field."""
    return " ".join(text.split()[:words])


def written(signal: Signal, rng: np.random.Generator) -> str:
    """A signal in a template that is drawn; a choice half of the time, where it can be one."""
    if signal.others and signal.kind in CHOICE and rng.random() < 0.5:
        few = rng.permutation(len(signal.others))[:3]
        options = [signal.others[int(i)] for i in few]
        right = int(rng.integers(len(options) + 1))
        options.insert(right, signal.answer)
        listed = "\n".join(f"({LETTERS[k]}) {option}" for k, option in enumerate(options))
        template = CHOICE[signal.kind][int(rng.integers(len(CHOICE[signal.kind])))]
        return template.format(source=signal.source, options=listed, answer=f"({LETTERS[right]}) {signal.answer}")
    template = GENERATION[signal.kind][int(rng.integers(len(GENERATION[signal.kind])))]
    return template.format(source=signal.source, answer=signal.answer)


def read(text: str) -> list[tuple[str, str, str]]:
    """(kind, source, answer) of every template that a text may come from: the templates inverted."""
    fields = {
        "{source}": "(?P<source>.+?)",
        "{options}": r"(?P<options>\([A-H]\) [^\n]*(?:\n\([A-H]\) [^\n]*)+)",
        "{answer}": "(?P<answer>.+?)",
    }
    out = []
    for kind, template in ((k, t) for table in (GENERATION, CHOICE) for k, ts in table.items() for t in ts):
        pattern = "".join(fields.get(part, re.escape(part)) for part in re.split(r"(\{\w+\})", template))
        if match := re.fullmatch(pattern, text, re.DOTALL):
            chosen = "options" in match.groupdict()
            out.append((kind, match["source"], match["answer"][4:] if chosen else match["answer"]))
    return out
