"""normalise: canonical text: Unicode form, line ends, control characters, trailing space.

    text -> NFC -> "\\n" line ends -> no control characters but tab and newline -> no trailing space
         -> at most `blank_lines` empty lines in a row

NFC keeps what a reader sees (Unicode Standard Annex #15); NFKC, as in Penedo et al. 2023's
(arXiv:2306.01116) and others' pipelines, would also turn superscripts and ligatures into other letters.
Code keeps its runs of empty lines. A text that is empty afterwards is dropped.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from modicum.data.document import Document, Drop
from modicum.data.steps import Step

# C0 and C1 controls but tab and newline, zero-width marks that carry nothing (byte-order mark, word joiner).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ufeff\u2060]")
_LINE_END = re.compile("\r\n|\r|\x85|\u2028|\u2029|\x0c")
_TRAILING = re.compile(r"[^\S\n]+(?=\n|\Z)")


@dataclass(frozen=True, kw_only=True)
class Config:
    form: Literal["NFC", "NFKC", "none"] = "NFC"
    blank_lines: int = 2  # empty lines kept in a row, in prose


class Normalise(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._blank = re.compile("\n{" + str(config.blank_lines + 2) + ",}")

    def each(self, document: Document) -> Iterable[Document | Drop]:
        text = document.text
        if self.config.form != "none" and not unicodedata.is_normalized(self.config.form, text):
            text = unicodedata.normalize(self.config.form, text)
        text = _TRAILING.sub("", _CONTROL.sub("", _LINE_END.sub("\n", text)))
        if document.domain != "code":
            text = self._blank.sub("\n" * (self.config.blank_lines + 1), text)
        text = text.strip("\n")
        if not text.strip():
            yield Drop(document.id, "empty", "nothing is left but spaces")
        elif text == document.text:
            yield document
        else:
            yield Document(document.id, text, document.domain, document.source, document.meta)
