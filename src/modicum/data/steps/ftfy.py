"""ftfy: repair text that was decoded with the wrong encoding, and what web pages do to quotes and entities.

It makes "schön" of "schÃ¶n": text in UTF-8 that somebody read as Windows-1252 or the like, once or several times, is
encoded back, if that gives valid text of fewer odd characters. Left-over HTML entities, terminal escapes and broken
surrogates go as well.

Speer 2019, the library `ftfy` (Apache-2.0), whose heuristic decides; it changes nothing that is plausible as it is.
Departs from its defaults: quotes, ligatures and character widths stay as the author wrote them, and the Unicode form is
the step `normalise`'s. Code passes as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modicum.core.errors import MissingExtra
from modicum.data.document import Document, Drop
from modicum.data.steps import Step


@dataclass(frozen=True, kw_only=True)
class Config:
    straight_quotes: bool = False  # curly quotes to straight ones


@functools.cache
def _library() -> Any:
    try:
        import ftfy
    except ImportError:
        raise MissingExtra("ftfy", "data", "the step ftfy") from None
    return ftfy


class Ftfy(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.repaired = 0

    def each(self, document: Document) -> Iterable[Document | Drop]:
        if document.domain == "code" or (document.text.isascii() and "&" not in document.text):
            yield document
            return
        text = _library().fix_text(
            document.text,
            uncurl_quotes=self.config.straight_quotes,
            fix_latin_ligatures=False,
            fix_character_width=False,
            normalization=None,
        )
        if text == document.text:
            yield document
        elif not text.strip():
            yield Drop(document.id, "empty", "nothing is left but spaces")
        else:
            self.repaired += 1
            yield dataclasses.replace(document, text=text)

    def close(self) -> dict[str, float]:
        return {"repaired": self.repaired}
