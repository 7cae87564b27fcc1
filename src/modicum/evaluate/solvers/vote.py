"""vote: several sampled replies, the answer that most of them give (self-consistency).

    answer = mode of extract(reply_1), ..., extract(reply_n);        a tie goes to the likelier replies

Replies without an answer do not vote. The graded text is the likeliest reply, per token, among those of the winner.

Wang et al. 2022, arXiv:2203.11171 (self-consistency).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from modicum.evaluate.solvers import Attempt, Call, Problem, Reply, Solver

SWEEP = ("n=5", "n=5,think=True")


@dataclass(frozen=True, kw_only=True)
class Config:
    n: int = 5  # samples
    temperature: float = 0.7
    think: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.temperature <= 0:
            raise ValueError("n must be at least 1, temperature above 0 (equal replies need no vote)")


class Vote(Solver):
    config: Config

    def attempt(self, problem: Problem) -> Attempt:
        c = self.config
        replies = yield Call(problem.prompt, c.n, c.temperature, think=c.think, final=True)
        return winner(replies, problem).text


def winner(replies: list[Reply], problem: Problem) -> Reply:
    """The best reply of the answer given most often."""
    votes: dict[str, list[Reply]] = defaultdict(list)
    for reply in replies:
        if answer := problem.extract(reply.text):
            votes[answer].append(reply)
    if not votes:
        return replies[0]

    def nats(reply: Reply) -> float:
        return reply.nats / max(reply.tokens, 1)

    group = max(votes.values(), key=lambda g: (len(g), -min(map(nats, g))))
    return min(group, key=nats)
