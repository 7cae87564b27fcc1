"""language: keep documents of some languages, and write into each which it is.

    p(l | d)  proportional to  p(l) prod over byte n-grams g of d of p(g | l)        keep d if argmax is in `keep`

Lui and Baldwin 2012 (langid.py, ACL system demonstrations): naive Bayes over byte n-grams that tell languages and not
domains apart, 97 languages. The model is inside the package `py3langid` (BSD-3-Clause). Departs from it: a document's
beginning decides, of `characters`; shorter ones than `shortest` pass unless `short=false`, as few letters say nothing;
code passes as it is. With `keep=[]` all languages stay and are only named.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from modicum.core.errors import MissingExtra
from modicum.data.document import Document, Drop
from modicum.data.steps import Step

SWEEP = ("keep=[en]",)  # by default it only names languages


@dataclass(frozen=True, kw_only=True)
class Config:
    keep: list[str] = field(default_factory=list)  # ISO 639-1 codes, such as [en, fr]; empty: all
    probability: float = 0.5  # of the language, at least
    characters: int = 4000  # of the beginning that are read
    shortest: int = 20  # characters; of shorter texts the language is not told
    short: bool = True  # keep these

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or self.characters < 1:
            raise ValueError("probability lies in [0, 1], characters is at least 1")


@functools.cache
def identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingExtra("py3langid", "data", "the step language") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Language(Step):
    config: Config

    def each(self, document: Document) -> Iterable[Document | Drop]:
        head = " ".join(document.text[: self.config.characters].split())
        if document.domain == "code":
            yield document
            return
        if len(head) < self.config.shortest:
            short = Drop(document.id, "too-short", f"{len(head)} characters, too few to tell the language")
            yield document if self.config.short else short
            return
        code, p = identifier().classify(head)
        p = float(p)
        if self.config.keep and (code not in self.config.keep or p < self.config.probability):
            yield Drop(document.id, "language", f"{code} with probability {p:.2f}, kept: {', '.join(self.config.keep)}")
        else:
            yield dataclasses.replace(document, meta=document.meta | {"language": code, "language_prob": round(p, 4)})
