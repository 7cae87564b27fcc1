"""best-of-n: several sampled replies, the one that the model itself finds likeliest per token.

    answer = argmin_i  -log p(reply_i | question) / tokens_i

The verifier is the model's own likelihood, so nothing else is needed; a trained reward model is not.

Adiwardana et al. 2020, arXiv:2001.09977, section 2.2 (sample and rank by likelihood).
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.evaluate.solvers import Attempt, Problem, Solver, _sampled


@dataclass(frozen=True, kw_only=True)
class Config(_sampled.Config):
    pass


class BestOfN(Solver):
    config: Config

    def attempt(self, problem: Problem) -> Attempt:
        replies = yield from _sampled.sample(self.config, problem)
        answered = [r for r in replies if problem.extract(r.text)] or replies
        return min(answered, key=_sampled.nats_per_token).text
