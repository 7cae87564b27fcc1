"""wrap: passages rephrased in a style, beside the original.

A document is cut into passages of at most 300 tokens at the ends of sentences; each is rephrased once, in one style:

    D' = D + { rephrase(p, style) : p in passages(d), d in D }        trained on 1:1

Rephrasings come as documents of the domain `DOMAIN-rewritten`, so that a mixture gives both as many tokens:
`fixed:weights={prose: 1, prose-rewritten: 1}`. A reply is stripped of its preface and refused where its length, its
repetitions, its terms or words of the prompt speak against it; the original is always kept.

Maini et al. 2024, "Rephrasing the Web" (arXiv:2401.16380), sections 3 and 4, appendix G. Departs from it: passages are
counted in words and marks; prompts are this file's own; a reply is checked (the paper keeps all); one style at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.replies import Request, ask
from modicum.data.rewrites import Rewriter, Rounds, sampling
from modicum.data.rewrites._text import count, passages, plain, refused

CLAIM = {
    "figure": "the same loss about three times sooner; perplexity on the Pile 10% lower",
    "where": "abstract",
    "scale": "1.3B parameters, C4, a rephraser of 7B",
}
STYLES = {
    "easy": "Say the text below again so that a small child understands it: short sentences and very simple words.",
    "medium": "Write the text below again in clear, plain English of good quality, as an encyclopedia would put it.",
    "hard": "Write the text below again for scholars: terse, abstract, with learned and unusual words.",
    "qa": "Turn the text below into questions with their answers. Begin each question with 'Question:' and its answer "
    "with 'Answer:'. Use only what the text states.",
}
ENDING = " Keep every fact. Answer with the result alone.\n\n"


@dataclass(frozen=True, kw_only=True)
class Config:
    style: str = "medium"  # easy, medium, hard or qa
    tokens: int = 300  # of a passage, at most
    least: int = 20  # shorter passages are not rephrased
    temperature: float = 0.7
    top_p: float = 0.95
    shortest: float = 0.5  # of the passage's length that a rephrasing has at least
    longest: float = 1.6
    least_overlap: float = 0.3  # cosine of the two texts' terms

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style={self.style} is none of {', '.join(STYLES)}")
        if self.tokens < 1 or not 0 <= self.shortest < self.longest:
            raise ValueError("tokens must be at least 1, and shortest below longest")


class Wrap(Rewriter):
    config: Config

    def request(self, passage: str) -> Request:
        prompt = STYLES[self.config.style] + ENDING + passage.strip()
        most = int(2.2 * self.config.longest * count(passage)) + 16  # a word or mark is up to two tokens and some
        return ask(prompt, max_tokens=most, **sampling(self.config))

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        if document.domain == "code":
            return [document]
        config = self.config
        chosen = [p for p in passages(document.text, config.tokens) if count(p) >= config.least]
        replies = yield [self.request(p) for p in chosen]
        out: list[Document | Drop] = [document]
        for k, (passage, reply) in enumerate(zip(chosen, replies, strict=True)):
            text = plain(reply.text)
            why: tuple[str, str] | None = ("unfinished", "cut at max_tokens")
            if reply.ended == "stop":
                why = refused(
                    passage,
                    text,
                    STYLES[config.style] + ENDING,
                    shortest=config.shortest,
                    longest=config.longest,
                    least_overlap=config.least_overlap,
                )
            made = self.made(document, text, f"{k}")
            out.append(Drop(made.id, *why) if why else made)
        return out
