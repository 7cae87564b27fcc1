"""tpt: a document with an expert's thoughts about it appended.

    x = [d ; t]        t = generator(d), once; plain next-token loss over all of x

Nothing is filtered: what is hard to follow gets longer thoughts, and so more training. The thoughts come after the
document, never before it. A document that is longer than `tokens` is cut there, and the rest follows as one of its own,
without thoughts, so that no text is lost.

Wang et al. 2025, "Thinking augmented pre-training" (arXiv:2509.20186), equation 1, sections 3 and 4, appendix A.
Departs from it: lengths are counted in words and marks; the prompt is this file's own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.replies import Request, ask
from modicum.data.rewrites import Rewriter, Rounds, sampling
from modicum.data.rewrites._text import count, head

SWEEP = ("thought_tokens=96",)  # a model of 135M has no longer thoughts worth their seconds

CLAIM = {
    "figure": "three times the data efficiency; a mean of five tasks of 43.9 for 26.2",
    "where": "abstract; Table 2",
    "scale": "8B parameters, 100B tokens",
}
INSTRUCTION = (
    "Read the text below as an expert of its field would. Think aloud, step by step: what does each part mean, why is "
    "it so, how does one come from one part to the next, what has to be known to follow it? Write only the thoughts."
    "\n\n"
)
END = "</think>"


@dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int = 2000  # of a document
    thought_tokens: int = 8000  # of its thoughts, at most
    temperature: float = 0.6
    top_p: float = 0.9
    separator: str = "\n\n"  # between the document and its thoughts

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.thought_tokens < 1:
            raise ValueError("tokens and thought_tokens must be at least 1")


class Tpt(Rewriter):
    config: Config

    def request(self, text: str) -> Request:
        most = self.config.thought_tokens
        return ask(INSTRUCTION + text, max_tokens=most, stop=(END,), **sampling(self.config))

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        text = head(document.text, self.config.tokens)
        if count(text) == 0:
            return [document]
        (reply,) = yield [self.request(text)]
        thoughts = reply.text.removeprefix("<think>").strip()
        out: list[Document | Drop] = []
        if thoughts:
            meta = document.meta | {"rewritten": self.key}
            out.append(dataclasses.replace(document, text=text + self.config.separator + thoughts, meta=meta))
            rest = document.text[len(text) :].strip()
            if rest:
                out.append(self.made(document, rest, "-rest", domain=""))
        else:
            out += [document, Drop(f"{document.id}#{self.key}", "no-thoughts", "the reply is empty")]
        return out
