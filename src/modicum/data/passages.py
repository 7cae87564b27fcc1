"""Passages for retrieval: chunks of documents that can be understood by themselves.

A Python file gives one passage for each documented function, class and module; text with headings one for each
section; other text runs of paragraphs. Longer passages are split at paragraphs, and may overlap; each keeps its
headings and what is known of its document.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from modicum.core.errors import UserError
from modicum.data.document import Document
from modicum.data.python_source import DOC_FORMAT, first_sentence, functions

WORDS = 200  # a passage is cut where it has more
SCALARS = (str, int, float, bool)  # kinds of metadata that searches can filter by
LEAST = 5  # and left out where it has fewer
_MARKDOWN_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$")
_UNDERLINE = re.compile(r"^([=\-~^*+\"'`#])\1{2,}\s*$")
_FENCE = re.compile(r"^\s*(```|~~~)")
_SPACE = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Passage:
    """title: a function's name, or the headings above it. text: the content; a function's begins with its
    signature. summary: the content's first sentence, "" if there is none or nothing follows it; body: the
    text without the summary, so that a search for the summary has to find the passage by other words. meta: the
    document's domain and what else is known of it, text, numbers and truth values by name."""

    id: str
    text: str
    source: str
    title: str
    summary: str = ""
    body: str = ""
    meta: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Section:
    """A heading with the text under it, down to the next heading. path: the headings above it, outermost first."""

    heading: str
    path: tuple[str, ...]
    body: str


def passages(documents: Iterable[Document] | Document, words: int = WORDS, overlap: int = 0) -> Iterator[Passage]:
    """Passages of at most about `words` words, of which `overlap` repeat the end of the one before where a text had to
    be split; ids are unique within a document. Raises `UserError` for an overlap of more than half."""
    if words < 1 or not 0 <= overlap <= words // 2:
        raise UserError(f"overlap={overlap} must lie between 0 and half of words={words}")
    for document in [documents] if isinstance(documents, Document) else documents:
        seen: Counter[str] = Counter()
        meta = {"domain": document.domain} | {k: v for k, v in document.meta.items() if isinstance(v, SCALARS)}
        for passage in _of(document, words, overlap):
            seen[passage.id] += 1
            again = seen[passage.id]
            yield replace(passage, id=passage.id if again == 1 else f"{passage.id}~{again}", meta=meta)


def is_python(document: Document) -> bool:
    """Whether `functions` can read it: Python source, or the language taken out of it."""
    return document.meta.get("format") == DOC_FORMAT or document.meta.get("language") == "python"


def _of(document: Document, words: int, overlap: int) -> Iterator[Passage]:
    source = document.source or document.id
    if is_python(document):
        for f in functions(document):
            shown = f.signature if f.kind == "module" else _qualified(f.name, f.signature)
            yield from _cut(f"{document.id}::{f.name}", shown, f.name, f.doc, source, words, overlap)
    elif document.domain == "code":
        blocks = re.split(r"\n(?=\S)", document.text)
        for n, block in enumerate(_pack(blocks, words, "\n", overlap)):
            if len(block.split()) >= LEAST:
                yield Passage(f"{document.id}@{n}", block, source, source)
    else:
        for n, section in enumerate(sections(document)):
            title = " > ".join(section.path) or source
            yield from _cut(f"{document.id}@{n}", "", title, section.body, source, words, overlap)


def _qualified(name: str, signature: str) -> str:
    """`loads(s)` of json.loads -> `json.loads(s)`; `class A(B)` of m.A -> `class m.A(B)`."""
    short_name = name.rpartition(".")[2]
    prefix = "class " if signature.startswith("class ") else ""
    return prefix + name + signature.removeprefix(prefix).removeprefix(short_name)


def _cut(id_: str, shown: str, title: str, body: str, source: str, words: int, overlap: int) -> Iterator[Passage]:
    chunks = [c for c in _pack(_SPACE.split(body), words, "\n\n", overlap) if c.strip()]
    for n, chunk in enumerate(chunks):
        if len(chunk.split()) < LEAST and not (shown and n == 0):
            continue
        summary, rest = first_sentence(chunk) if n == 0 else ("", "")
        head = f"{shown}\n\n" if shown else ""
        if len(summary.split()) < 4 or not rest:
            summary = rest = ""
        yield Passage(
            id_ if n == 0 else f"{id_}+{n}", head + chunk, source, title, summary, head + rest if summary else ""
        )


def _pack(blocks: Iterable[str], words: int, joint: str, overlap: int = 0) -> Iterator[str]:
    """Consecutive blocks joined while they stay within `words`; a larger block is cut at words. What follows a cut
    begins with the last `overlap` words before it."""
    waiting: list[str] = []
    count = 0
    for block in blocks:
        size = len(block.split())
        if waiting and count + size > words:
            text = joint.join(waiting)
            yield text
            waiting = _tail(text, overlap)
            count = overlap if waiting else 0
        if waiting and size > 2 * words:
            block, waiting, count = joint.join([*waiting, block]), [], 0
        while size > 2 * words:
            end = [m.end() for m in re.finditer(r"\S+", block)][words - 1]
            yield block[:end]
            block = "".join(_tail(block[:end], overlap)) + block[end:]
            size = len(block.split())
        waiting.append(block)
        count += size
    if waiting:
        yield joint.join(waiting)


def _tail(text: str, words: int) -> list[str]:
    """[the last `words` words of a text], or [] for none."""
    starts = [m.start() for m in re.finditer(r"\S+", text)]
    return [text[starts[-words] :]] if words and len(starts) >= words else []


def sections(document: Document) -> Iterator[Section]:
    """The sections of a text: Markdown headings (`#`), or lines underlined as in reStructuredText.

    A text without headings is one section under its title, or under none.
    """
    title = str(document.meta.get("title") or "")
    markdown = document.meta.get("format") == "markdown"
    stack: list[tuple[int, str]] = []
    levels: dict[str, int] = {}
    body: list[str] = []
    lines = document.text.splitlines()
    fenced, k = False, 0

    def section() -> Iterator[Section]:
        text = "\n".join(body).strip("\n")
        if text.strip():
            path = tuple(heading for _, heading in stack)
            path = path if not title or path[:1] == (title,) else (title, *path)
            yield Section(path[-1] if path else "", path, text)

    while k < len(lines):
        line = lines[k]
        level, heading = 0, ""
        if _FENCE.match(line):
            fenced = not fenced
        elif markdown and not fenced and (match := _MARKDOWN_HEADING.match(line)):
            level, heading = len(match[1]), match[2]
        elif not fenced and k + 1 < len(lines) and _is_title(line, lines[k + 1]):
            underline = lines[k + 1][0]
            level, heading = levels.setdefault(underline, len(levels) + 1), line.strip()
            k += 1
        if level:
            yield from section()
            body = []
            while stack and stack[-1][0] >= level:
                stack.pop()
            stack.append((level, heading))
        else:
            body.append(line)
        k += 1
    yield from section()


def _is_title(line: str, under: str) -> bool:
    return (
        bool(_UNDERLINE.match(under))
        and 0 < len(line.strip()) <= len(under.rstrip()) + 1
        and not line.startswith((" ", "\t"))
        and any(map(str.isalpha, line))
    )
