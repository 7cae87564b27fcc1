"""python-split: Python files into language (docstrings, longer comments) and code, as two domains.

    document -> document#prose (domain "prose")  +  document#code (domain "code")

Language and code can then be weighed, filtered and evaluated apart. Every docstring stands under a
heading with the qualified signature it documents; comment blocks of three lines or more count as
language if they read like it. Nothing is in both. Other languages and files that this Python cannot
parse pass as they are.
Not from a paper; the separation of docstring and body follows CodeSearchNet (Husain et al. 2019,
arXiv:1909.09436), which pairs them instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from modicum.data.document import Document, Drop
from modicum.data.python_source import DOC_FORMAT, split
from modicum.data.steps import Step


@dataclass(frozen=True, kw_only=True)
class Config:
    min_characters: int = 1  # parts shorter than this are dropped as too-short


class PythonSplit(Step):
    config: Config

    def each(self, document: Document) -> Iterable[Document | Drop]:
        parts = split(document) if document.meta.get("language") == "python" else None
        if parts is None:
            yield document
            return
        for domain, text in zip(("prose", "code"), parts, strict=True):
            name = f"{document.id}#{domain}"
            if len(text.strip()) >= self.config.min_characters:
                meta = document.meta | {"part_of": document.origin}
                if domain == "prose":
                    del meta["language"]
                    meta |= {"format": DOC_FORMAT, "kind": "reference"}
                yield Document(name, text, domain, document.source, meta)
            elif text.strip():
                yield Drop(name, "too-short", f"{len(text)} characters")
