"""qwenlong-cprs: of each passage only the sentences that a tagging model marks as supporting the question.

The context, after an instruction and the question, is read in windows by a language model whose upper quarter attends
in both directions; each token gets one of B, I, E, O. What is shown is what they join to:

    spans = runs from B to E, gaps of fewer than `gap` O filled, spans of fewer than `least` tokens dropped,
            each grown to whole sentences

in the order of the passage. Where they exceed the passage's tokens, those that the critic, the model's own head at the
tag word, finds least likely are left out; where nothing is marked, the sentences around the match are shown as in
`ranked`. Train the tagger with `tagger.fit`. Shen et al. 2025, arXiv:2505.18092, with the authors' model and inference
code. Departs: the model, its windows and its weights are the user's (the authors train a 7B one for 8,192 tokens);
passages keep the order of their ranks; the context is a passage, as search returned it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.retrieve.excerpt import excerpt
from modicum.retrieve.readers import Reader
from modicum.retrieve.tagger import Tagger, joined, sentences

NOT_MEASURABLE = "it needs a tagger trained on contexts with marked facts, which the bench's questions do not have"

CLAIM = {"figure": "21.59 times fewer tokens with 19.15 points more on average", "where": "abstract",
         "scale": "Qwen2-7B tagger, flagship readers, contexts of 4 thousand to 2 million tokens"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str  # a folder that Tagger.save left
    gap: Annotated[int, Field(ge=1)] = 20  # O within a span from which it is two
    least: Annotated[int, Field(ge=1)] = 5  # tokens of a span
    whole: bool = True  # spans grow to whole sentences


class Cprs(Reader):
    config: Config

    def __init__(self, config: Any):
        super().__init__(config)
        self.tagger = Tagger.open(config.model)

    def order(self, count: int) -> list[int]:
        return list(range(count))

    def shorten(self, text: str, question: str, limit: int, count: Callable[[str], int]) -> str:
        parts = self.marked(question, text)
        for _, drop in sorted((score, n) for n, (*_, score) in enumerate(parts)):  # the least likely first
            shown = " ".join(text[a:b].strip() for a, b, _ in parts if b > a)
            if count(shown) <= limit:
                break
            a, _, score = parts[drop]
            parts[drop] = (a, a, score)
        shown = " ".join(text[a:b].strip() for a, b, _ in parts if b > a)
        return shown if shown and count(shown) <= limit else excerpt(text, question, limit, count)

    def marked(self, question: str, text: str) -> list[tuple[int, int, float]]:
        """(first character, last, mean of the critic) of what supports the question, in the order of the text."""
        tags_T, critic_T, offsets = self.tagger.tags(question, text)
        scores: dict[tuple[int, int], list[float]] = {}
        whole = sentences(text)
        for a, b in joined(tags_T.tolist(), self.config.gap, self.config.least):
            start, end, score = offsets[a][0], offsets[b - 1][1], float(np.mean(critic_T[a:b]))
            touched = [s for s in whole if s[0] < end and s[1] > start] if self.config.whole else [(start, end)]
            for part in touched:
                scores.setdefault(part, []).append(score)
        return [(a, b, max(values)) for (a, b), values in sorted(scores.items())]
