"""port solver: test-time compute: how many generations of a model one question gets, and which of them is the answer.

A solver is built from its config alone. `attempt` is a generator: it yields `Call`s and receives their replies, and
returns the text that is graded. `solve` drives any number of attempts at once, so that the calls of many questions
run in one batch, counts every generated token, and stops an attempt at its token budget.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from modicum.core.files import fingerprint
from modicum.core.registry import Method

BASELINE = "greedy"


def plain_layout(question: str, steps: Sequence[tuple[str, str]], step: str) -> str:
    """A sub-problem's prompt: the question, earlier sub-problems with their answers (no reasoning), this one."""
    earlier = "".join(f"{name}\nAnswer: {answer}\n" for name, answer in steps)
    return f"{question}\n\n{earlier}{step}\nAnswer:"


@dataclass(frozen=True)
class Problem:
    """A question. extract: the answer in a reply, by which replies are compared.

    steps: an outline that is given, `{0}`, `{1}` standing for the answers of earlier steps; layout: the prompt of one.
    """

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ("\n",)
    lead: str = ""
    extract: Callable[[str], str] = str.strip
    steps: tuple[str, ...] = ()
    layout: Callable[[str, Sequence[tuple[str, str]], str], str] = plain_layout


@dataclass(frozen=True)
class Call:
    """`n` replies to a prompt. think: the slow mode, with reasoning before the answer.

    final: whether a reply answers the whole question, so that it counts if the budget ends here. wrap: whether the
    prompt is the solver's own instruction instead of the question; then no `lead` begins the reply.
    """

    prompt: str
    n: int = 1
    temperature: float = 0.0
    max_new_tokens: int | None = None  # None: the problem's
    stop: tuple[str, ...] | None = None  # None: the problem's
    think: bool = False
    final: bool = False
    wrap: bool = False


@dataclass(frozen=True)
class Reply:
    """tokens: generated; nats: their negative log-likelihood under the model's own distribution, summed."""

    text: str
    tokens: int
    nats: float
    prompt_tokens: int = 0


@dataclass
class Solved:
    """text: what is graded. trace: every call with its replies, in order. cut: the budget ended the attempt."""

    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    generations: int = 0
    cut: bool = False
    trace: list[dict[str, Any]] = field(default_factory=list)


Attempt = Generator[Call, list[Reply], str]
# (problem, call, seed) of many attempts -> the replies of each
Ask = Callable[[Sequence[tuple[Problem, Call, int]]], list[list[Reply]]]


class Solver(Method):
    """Base of every solver. Errors of a reply (an outline that cannot be parsed) are the solver's to handle."""

    provides: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def attempt(self, problem: Problem) -> Attempt:
        """Yield calls, receive their replies, return the text to grade. Deterministic given the replies."""


def solve(
    solver: Solver, problems: Sequence[Problem], ask: Ask, *, budget: int | None = None, seed: int = 0
) -> list[Solved]:
    """Every problem by `solver`, at most `budget` generated tokens each (None: no limit).

    The call that would pass the budget is shortened, its samples first in length, then in number; where nothing is
    left, the last reply that answered the whole question is the answer.
    """
    results = [Solved() for _ in problems]
    attempts = [solver.attempt(problem) for problem in problems]
    pending: dict[int, Call] = {}

    def advance(i: int, replies: list[Reply] | None) -> None:
        pending.pop(i, None)
        try:
            call = attempts[i].send(replies) if replies is not None else next(attempts[i])
        except StopIteration as end:
            results[i].text = end.value
            return
        shortened = fitted(call, problems[i], None if budget is None else budget - results[i].tokens)
        if shortened is None:
            results[i].cut = True
            attempts[i].close()
            return
        pending[i] = shortened

    for i in range(len(problems)):
        advance(i, None)
    while pending:
        batch = sorted(pending)
        seeds = [int(fingerprint([seed, problems[i].prompt, len(results[i].trace)])[:12], 16) for i in batch]
        answers = ask([(problems[i], pending[i], s) for i, s in zip(batch, seeds, strict=True)])
        for i, replies in zip(batch, answers, strict=True):
            call, result = pending[i], results[i]
            result.tokens += sum(r.tokens for r in replies)
            result.prompt_tokens += replies[0].prompt_tokens if replies else 0
            result.generations += len(replies)
            result.trace.append({"call": call, "replies": replies})
            if call.final and replies:
                result.text = replies[0].text
            advance(i, replies)
    return results


def fitted(call: Call, problem: Problem, left: int | None) -> Call | None:
    """The call with its limits filled in, within `left` tokens; None where nothing is left."""
    most = problem.max_new_tokens if call.max_new_tokens is None else call.max_new_tokens
    n = call.n
    if left is not None:
        if left < 1:
            return None
        n = min(n, left)
        most = min(most, left // n)
    return dataclasses.replace(call, n=n, max_new_tokens=most, stop=problem.stop if call.stop is None else call.stop)
