"""vote: several sampled replies, the answer that most of them give (self-consistency).

    answer = mode of extract(reply_1), ..., extract(reply_n);        a tie goes to the likelier replies

Replies without an answer do not vote. The graded text is the likeliest reply, per token, among those of the winner.

Wang et al. 2022, arXiv:2203.11171 (self-consistency).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from modicum.evaluate.solvers import Attempt, Problem, Reply, Solver, _sampled

SWEEP = ("n=5", "n=5,think=True")


@dataclass(frozen=True, kw_only=True)
class Config(_sampled.Config):
    pass


class Vote(Solver):
    config: Config

    def attempt(self, problem: Problem) -> Attempt:
        return winner((yield from _sampled.sample(self.config, problem)), problem).text


def winner(replies: list[Reply], problem: Problem) -> Reply:
    """The best reply of the answer given most often."""
    votes: dict[str, list[Reply]] = defaultdict(list)
    for reply in replies:
        if answer := problem.extract(reply.text):
            votes[answer].append(reply)
    if not votes:
        return replies[0]
    group = max(votes.values(), key=lambda g: (len(g), -min(map(_sampled.nats_per_token, g))))
    return min(group, key=_sampled.nats_per_token)
