"""greedy: one reply, the likeliest token at every position.

    answer = argmax decoding of p(. | question)

`think=true` asks for reasoning before the answer, the slow mode of the same model. What every other solver is measured
against: they spend more tokens, and must be worth them.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.evaluate.solvers import Attempt, Call, Problem, Solver

SWEEP = ("think=True",)


@dataclass(frozen=True, kw_only=True)
class Config:
    think: bool = False  # the slow mode: reasoning before the answer


class Greedy(Solver):
    config: Config

    def attempt(self, problem: Problem) -> Attempt:
        (reply,) = yield Call(problem.prompt, think=self.config.think, final=True)
        return reply.text
