"""rewire: a draft improved by a generator that first says what is wrong with it, beside the original.

The generator writes what the text is for, what is wrong with it and a plan, then an improved version between marks;
only that is kept, and a reply without marks is dropped. Every document is rewritten, the good ones too; then both sides
are filtered, each by a classifier of its own:

    train = top(D, q_raw, 10%) + top(rewrite(D), q_rewritten, 10%)

with the step `dclm` once for the raw domains and once for `*-rewritten`, whose negatives are rewritten texts (else
style alone would tell the classes apart). A document may come in as raw, as rewritten, or both: two ids, one origin.

Nguyen et al. 2025, "Recycling the Web" (arXiv:2506.04689), sections 2 to 4, appendix B. Departs from it: the prompt is
this file's own; documents are cut to `tokens` for the generator's context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.replies import Request, ask
from modicum.data.rewrites import Rewriter, Rounds, sampling
from modicum.data.rewrites._text import count, head, tagged

SWEEP = ("plan=false",)  # a model of 135M makes no plan worth its tokens

CLAIM = {
    "figure": "1.0, 1.3 and 2.5 points more of CORE over filtered raw text",
    "where": "Table 1",
    "scale": "1B, 3B and 7B parameters; a rewriter of 70B",
}
PLANNED = (
    "Below is a draft. First write down in a few sentences what it is for, what is wrong with it, and how you would "
    "improve it. Then write the improved version, no shorter than the draft and with all that it states, between "
    "<improved> and </improved>."
)
PLAIN = "Below is a draft. Write an improved version, no shorter than the draft, between <improved> and </improved>."


@dataclass(frozen=True, kw_only=True)
class Config:
    plan: bool = True  # the generator says first what is wrong; false: it writes the new version at once
    tokens: int = 1000  # of the draft that the generator sees
    least: int = 20  # shorter documents are not rewritten
    temperature: float = 1.0
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")


class Rewire(Rewriter):
    config: Config

    def request(self, draft: str) -> Request:
        instruction = PLANNED if self.config.plan else PLAIN
        most = int(3 * count(draft)) + (256 if self.config.plan else 32)
        return ask(f"{instruction}\n\n{draft.strip()}", max_tokens=most, **sampling(self.config))

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        draft = head(document.text, self.config.tokens)
        if document.domain == "code" or count(draft) < self.config.least:
            return [document]
        (reply,) = yield [self.request(draft)]
        text = tagged(reply.text, "improved")
        made = self.made(document, text or "")
        if text is None:
            why = "cut at max_tokens" if reply.ended == "length" else "there is no <improved>...</improved>"
            return [document, Drop(made.id, "no-marks", why)]
        return [document, made]
