"""What must hold for any solver: it repeats itself, keeps its budget, hides no call, is right where the model is."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from modicum.core import registry
from modicum.evaluate.solvers import Ask, Call, Problem, Reply, Solved, Solver, solve

PROBLEMS = [
    Problem(f"What is {i} + {i}?", 24, extract=str.strip, steps=(f"{i} + {i} =", "{0} + 0 =")) for i in range(4)
]


def _solver(key: str) -> Solver:
    loaded = registry.load("solver", key)
    solver: Solver = loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())
    return solver


class Scripted:
    """A generator of random replies, which writes down what it was given."""

    def __init__(self, right: bool = False, silent: bool = False):
        self.right, self.silent = right, silent
        self.calls: list[tuple[str, Call]] = []
        self.tokens = 0

    def __call__(self, batch: Sequence[tuple[Problem, Call, int]]) -> list[list[Reply]]:
        return [self.replies(*one) for one in batch]

    def replies(self, problem: Problem, call: Call, seed: int) -> list[Reply]:
        assert call.max_new_tokens is not None and call.max_new_tokens >= 1 and call.n >= 1
        self.calls.append((problem.prompt, call))
        rng = Random(seed if call.temperature else problem.prompt + call.prompt)
        made = []
        for _ in range(call.n):
            number = int(problem.prompt.split()[2])
            text = "" if self.silent else str(2 * number if self.right else rng.randint(0, 9))
            tokens = rng.randint(1, call.max_new_tokens)
            made.append(Reply(text, tokens, rng.random() * tokens, 5))
        self.tokens += sum(r.tokens for r in made)
        return made


def _run(key: str, ask: Ask, budget: int | None = None, seed: int = 0) -> list[Solved]:
    return solve(_solver(key), PROBLEMS, ask, budget=budget, seed=seed)


def check_same_seed_same_answers(key: str) -> None:
    first, again = _run(key, Scripted()), _run(key, Scripted())
    assert first == again, "the same seed and model gave other answers"


def check_questions_do_not_change_each_other(key: str) -> None:
    together = _run(key, Scripted())
    alone = [solve(_solver(key), [problem], Scripted())[0] for problem in PROBLEMS]
    assert together == alone, "an answer depends on which other questions are solved at the same time"


def check_every_call_is_counted(key: str) -> None:
    script = Scripted()
    results = _run(key, script)
    assert sum(r.tokens for r in results) == script.tokens, "tokens were generated that the results do not count"
    for problem, result in zip(PROBLEMS, results, strict=True):
        sent = [call for prompt, call in script.calls if prompt == problem.prompt]
        assert [entry["call"] for entry in result.trace] == sent, "the trace does not hold every call"
        assert result.generations == sum(call.n for call in sent)
        assert sent, "a problem was answered without the model"


def check_budget_is_never_passed(key: str) -> None:
    for budget in (1, 2, 7, 30, 100):
        for result in _run(key, Scripted(), budget):
            assert result.tokens <= budget, f"{result.tokens} tokens were generated, the budget is {budget}"


def check_right_where_the_model_is(key: str) -> None:
    for problem, result in zip(PROBLEMS, _run(key, Scripted(right=True)), strict=True):
        wanted = str(2 * int(problem.prompt.split()[2]))
        assert problem.extract(result.text) == wanted, f"a model that is always right gave {result.text!r}"


def check_empty_replies_are_survived(key: str) -> None:
    assert [r.text for r in _run(key, Scripted(silent=True))] == [""] * len(PROBLEMS)
