"""c4: keep lines that read like sentences, and pages that have five of them.

A line stays if it ends in . ? ! " or ' (and not in ...), has at least three words, none of over 1,000 characters, and
neither "javascript" nor a phrase of cookie banners. A page is dropped for "lorem ipsum", a curly bracket, or fewer than
five sentences in the lines that stay. Marks of citations ([1], [edit], [citation needed]) are taken out.

Raffel et al. 2020, arXiv:1910.10683, section 2.2, and the authors' code for what the paper leaves out (long words,
policies, citations). The list of bad words is not here; language is the step `language`'s. Decisions and text are those
of datatrove 0.10 with the same sentences. Departs from it: sentences are counted by their ends (`rules.sentences`),
where datatrove splits with spaCy. Code passes as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass

from modicum.data.document import Document, Drop
from modicum.data.rules import sentences
from modicum.data.steps import Step

ENDS = (".", "?", "!", '"', "'")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")


@dataclass(frozen=True, kw_only=True)
class Config:
    sentences: int = 5  # a page has at least
    line_words: int = 3  # a line has at least
    word_length: int = 1000  # characters of a word at most


class C4(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.dropped_lines = 0

    def each(self, document: Document) -> Iterable[Document | Drop]:
        if document.domain == "code":
            yield document
            return
        text, reason = self.clean(document.text)
        if reason:
            yield Drop(document.id, *reason)
        elif text == document.text:
            yield document
        else:
            yield dataclasses.replace(document, text=text)

    def clean(self, text: str) -> tuple[str, tuple[str, str] | None]:
        """What is left of the text, or why the page is dropped."""
        kept, count = [], 0
        for whole in text.splitlines():
            line = whole.strip()
            words = line.split()
            if any(len(w) > self.config.word_length for w in words):
                continue
            line = _CITATION.sub("", line)
            if not line.endswith(ENDS) or line.endswith("...") or len(words) < self.config.line_words:
                continue
            low = line.lower()
            if "lorem ipsum" in low:
                return "", ("lorem-ipsum", line[:80])
            if "javascript" in low:
                continue
            if "{" in line:
                return "", ("curly-bracket", line[:80])
            if any(policy in low for policy in POLICIES):
                continue
            count += sentences(line)
            kept.append(line)
        self.dropped_lines += text.count("\n") + 1 - len(kept)
        if count < self.config.sentences:
            return "", ("few-sentences", f"{count} in {len(kept)} lines")
        return "\n".join(kept).strip(), None

    def close(self) -> dict[str, float]:
        return {"lines_dropped": self.dropped_lines}
