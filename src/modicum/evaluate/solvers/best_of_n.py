"""best-of-n: several sampled replies, the one that the model itself finds likeliest per token.

    answer = argmin_i  -log p(reply_i | question) / tokens_i

The verifier is the model's own likelihood, so nothing else is needed; a trained reward model is not.

Adiwardana et al. 2020, arXiv:2001.09977, section 2.2 (sample and rank by likelihood).
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.evaluate.solvers import Attempt, Call, Problem, Solver


@dataclass(frozen=True, kw_only=True)
class Config:
    n: int = 5  # samples
    temperature: float = 0.7
    think: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.temperature <= 0:
            raise ValueError("n must be at least 1, temperature above 0 (equal replies need no ranking)")


class BestOfN(Solver):
    config: Config

    def attempt(self, problem: Problem) -> Attempt:
        c = self.config
        replies = yield Call(problem.prompt, c.n, c.temperature, think=c.think, final=True)
        answered = [r for r in replies if problem.extract(r.text)] or replies
        return min(answered, key=lambda r: r.nats / max(r.tokens, 1)).text
