"""Question/answer pairs made from documents, to adapt a model to answer questions about them.

Python: what a function does (its docstring), how it is called (its signature), which one does a given
thing (its summary). Text with headings: the heading asks, the section answers. Other text: a paragraph's
first sentence asks for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modicum.data.document import Document
from modicum.data.passages import is_python, sections
from modicum.data.python_source import Function, first_sentence, functions

ANSWER = 600  # characters; longer answers are cut at a paragraph, sentence or word
QUESTION = 300


@dataclass(frozen=True)
class Pair:
    id: str
    question: str
    answer: str
    source: str


def pairs(documents: Iterable[Document] | Document) -> Iterator[Pair]:
    """Every pair of the documents, in order; ids are unique within a document."""
    for document in [documents] if isinstance(documents, Document) else documents:
        source = document.source or document.id
        seen: set[str] = set()
        for n, (question, answer) in enumerate(_of(document)):
            if question not in seen and answer.strip():
                seen.add(question)
                yield Pair(f"{document.id}?{n}", question, answer.strip(), source)


def _of(document: Document) -> Iterator[tuple[str, str]]:
    if is_python(document):
        for function in functions(document):
            yield from _about(function)
    elif document.domain != "code":
        for section in sections(document):
            paragraphs = [p for p in section.body.split("\n\n") if len(p.split()) >= 8]
            if section.heading and paragraphs:
                yield _ask(section.heading, section.path[:-1]), shorten(section.body, ANSWER)
            else:
                for paragraph in paragraphs:
                    first, rest = first_sentence(paragraph)
                    if len(rest.split()) >= 8 and len(first) <= QUESTION:
                        yield f"What follows from this? {first}", shorten(rest, ANSWER)


def _ask(heading: str, path: tuple[str, ...]) -> str:
    if heading.endswith("?"):
        return heading
    if path:
        return f"What does {path[-1]!r} say about {heading!r}?"
    return f"What is there to know about {heading!r}?"


def _about(f: Function) -> Iterator[tuple[str, str]]:
    thing = f"`{f.name}`"
    does = {"module": f"What is the module {thing} for?", "class": f"What is the class {thing} for?"}
    yield does.get(f.kind, f"What does {thing} do?"), shorten(f.doc, ANSWER)
    if f.kind == "function":
        call = f"`{f.name}{f.signature.removeprefix(f.name.rpartition('.')[2])}`"
        yield f"How is {thing} called?", call
        if len(f.summary.split()) >= 4 and len(f.summary) <= QUESTION:
            yield f"Which function does this? {f.summary}", call


def shorten(text: str, most: int) -> str:
    """The beginning of a text, cut where a paragraph, sentence, line or word ends."""
    text = text.strip()
    if len(text) <= most:
        return text
    for boundary, keep in (("\n\n", 0), (". ", 1), ("\n", 0), (" ", 0)):
        at = text.rfind(boundary, most // 3, most)
        if at > 0:
            return text[: at + keep].rstrip()
    return text[:most]
