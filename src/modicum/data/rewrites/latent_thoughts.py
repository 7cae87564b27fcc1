"""latent-thoughts: the thought between two parts of a text, drawn by the model that learns from it.

    prior       prefix <S><prior> z <E> suffix                       what the model is to do
    posterior   prefix <S><E> suffix <S><posterior> z <E>            how it finds thoughts, knowing the end
    E step      z_k ~ q(z | prefix, suffix), k = 1 ... K
                log w_k = log p(z_k, suffix | prefix) - log q(z_k | prefix, suffix);  one z drawn from softmax(log w)
    bound       logsumexp(log w) - log K  <=  log p(suffix | prefix), tight as K grows
    M step      train on both layouts with the drawn thoughts; then again

Thoughts that were cut at their limit, or are empty, take no part. All sums are over every token, marks included, and
not divided by lengths. The first model learns from a teacher's thoughts on a small part (`teacher=true`: any chat
model, one thought, no weights). The recipe `latent-thoughts` goes through both.

Ruan et al. 2025, "Reasoning to Learn from Latent Thoughts" (arXiv:2503.18866), section 3, and the authors' BoLT.
Departs: marks are words of the text instead of reserved ids; parts are passages of `tokens` words and marks, paired
as they stand; likelihoods are those of the text as it is tokenized again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.replies import Request, ask
from modicum.data.rewrites import Rewriter, Rounds, sampling
from modicum.data.rewrites._text import passages

CLAIM = {"figure": "MATH 5.7 to 25.4% at equal raw tokens", "where": "abstract", "scale": "1.1B, 1.9B raw tokens"}
NOT_MEASURABLE = "a model of this bench's size has no thoughts; the weights are tested on a made process"
START, END, PRIOR, POSTERIOR = "<|thought|>", "<|/thought|>", "<|prior|>", "<|posterior|>"
INSTRUCTION = (
    "Here are the beginning and the continuation of a text. Write down briefly the thought that leads from the one to "
    "the other: what the author knew, meant or worked out. Write only the thought.\n\nBeginning:\n{prefix}\n\n"
    "Continuation:\n{suffix}"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    samples: int = 4  # K, thoughts of each pair
    tokens: int = 150  # of a passage; two of them make a pair
    thought_tokens: int = 256  # of a thought at most
    teacher: bool = False  # ask a chat model, for the first round
    temperature: float = 1.0  # q is then the model's own distribution
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.tokens < 1 or self.thought_tokens < 1:
            raise ValueError("samples, tokens and thought_tokens must be at least 1")
        if not self.teacher and (self.temperature != 1 or self.top_p != 1):
            raise ValueError("weights hold for temperature=1 and top_p=1; other values are for teacher=true")


class LatentThoughts(Rewriter):
    config: Config

    def pairs(self, text: str) -> list[tuple[str, str]]:
        """(prefix, suffix) of a text, neither of them empty."""
        parts = [p.strip() for p in passages(text, self.config.tokens)]
        return [(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False) if a and b]

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        pairs, config = self.pairs(document.text), self.config
        if not pairs:
            return [document]
        number = 1 if config.teacher else config.samples
        replies = yield [self._ask(*pair) for pair in pairs for _ in range(number)]
        thoughts = [
            (k // number, reply.text.strip())
            for k, reply in enumerate(replies)
            if reply.ended != "length" and reply.text.strip() and START not in reply.text
        ]
        if not thoughts:
            return [document, Drop(f"{document.id}#{self.key}", "no-thought", f"of {len(replies)} none was finished")]
        weights = [0.0] * len(thoughts)
        if not config.teacher:
            scores = yield [request for k, z in thoughts for request in scored(*pairs[k], z)]
            values = [reply.log_probability for reply in scores]
            if any(value is None for value in values):
                return [document, Drop(f"{document.id}#{self.key}", "unscored", "the generator gives no likelihoods")]
            joint, posterior = values[::2], values[1::2]
            weights = [
                float(p) - float(q) for p, q in zip(joint, posterior, strict=True) if p is not None and q is not None
            ]
        out: list[Document | Drop] = [document]
        for k, pair in enumerate(pairs):
            own = [i for i, (of, _) in enumerate(thoughts) if of == k]
            if own:
                log_w = np.array([weights[i] for i in own])
                chosen = own[draw(log_w, rng)]
                out += self._documents(document, k, pair, thoughts[chosen][1], log_w)
        return out

    def _ask(self, prefix: str, suffix: str) -> Request:
        most: dict[str, Any] = {"max_tokens": self.config.thought_tokens} | sampling(self.config)
        if self.config.teacher:
            return ask(INSTRUCTION.format(prefix=prefix, suffix=suffix), **most)
        return Request(prompt=before(prefix, suffix), stop=(END,), **most)

    def _documents(
        self, document: Document, k: int, pair: tuple[str, str], thought: str, log_w: np.ndarray
    ) -> list[Document]:
        prefix, suffix = pair
        made = [
            self.made(document, f"{prefix} {START}{PRIOR} {thought} {END} {suffix}", f"-prior{k}", "thoughts"),
            self.made(document, f"{before(prefix, suffix)} {thought} {END}", f"-posterior{k}", "thoughts"),
        ]
        if not self.config.teacher:
            for one in made:
                one.meta["bound"] = round(bound(log_w), 4)
        return made


def before(prefix: str, suffix: str) -> str:
    """What stands before a thought in the posterior's layout."""
    return f"{prefix} {START}{END} {suffix} {START}{POSTERIOR}"


def scored(prefix: str, suffix: str, thought: str) -> tuple[Request, Request]:
    """Requests for log p(z, suffix | prefix) and for log q(z | prefix, suffix)."""
    return (
        Request(prompt=prefix, continuation=f" {START}{PRIOR} {thought} {END} {suffix}", seed=0),
        Request(prompt=before(prefix, suffix), continuation=f" {thought} {END}", seed=0),
    )


def draw(log_w: np.ndarray, rng: np.random.Generator) -> int:
    """A number with probability softmax(log w)."""
    weight = np.exp(log_w - log_w.max())
    return int(rng.choice(len(weight), p=weight / weight.sum()))


def bound(log_w: np.ndarray) -> float:
    """logsumexp(log w) - log K."""
    return float(np.logaddexp.reduce(log_w)) - math.log(len(log_w))
