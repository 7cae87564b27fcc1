"""math-synthesis: new problem-solving text from problems with solutions, by one of four operators.

    diversify    two further solutions, in other ways; the reply begins with ACCEPT, or REFUSE where it has none
    expand       the problem as a statement, and two new problems with solutions, each solved once more as a check
    retrospect   steps of the solution inserted too early, then a mark, and on from where it should have gone
    tutor        a student's attempt; a teacher names the first wrong step, mends it and goes on

    kept:  answer(solution) = answer(seed)         answer: the number after ####, else the last number
           expand: answer(solution) = answer(second solution of the new problem)

The same records serve continued pretraining (plain loss over all) and fine-tuning. Seeds are documents in which a line
begins with "Answer:" or "Solution:"; others pass as they are. `retrospect` is a rule and asks nothing.

Chen et al. 2025, "Advancing mathematical reasoning in language models" (arXiv:2501.14002), section 4, appendix A.
Departs from it: the answers are compared by a program where the paper asks a model; one model is student and teacher;
prompts, and how far `retrospect` jumps, are this file's own, as they are not published.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document, Drop
from modicum.data.replies import Reply, ask
from modicum.data.rewrites import Rewriter, Rounds, sampling

NOT_MEASURABLE = (
    "the corpus of the bench has no problems with solutions; what the operators keep of right and wrong replies is "
    "tested with replies of known answers"
)
CLAIM = {
    "figure": "problem-solving text pays more than a corpus about mathematics; the tutor most of the four operators",
    "where": "abstract; section 5",
    "scale": "Llama-2 7B and 13B",
}
OPERATORS = ("diversify", "expand", "retrospect", "tutor")
BACK = "Wait, that step comes too early. Back to the step before it."
_ANSWER = re.compile(r"^(?:answer|solution)\s*:\s*", re.IGNORECASE | re.MULTILINE)
_QUESTION = re.compile(r"^\s*(?:question|problem)\s*:\s*", re.IGNORECASE)
_NUMBER = re.compile(r"[-\u2212]?\d[\d,]*(?:\.\d+)?")
_FINAL = re.compile(rf"####\s*\$?\s*({_NUMBER.pattern})")
_SOLUTION = re.compile(r"^\s*solution\s*\d*\s*:\s*", re.IGNORECASE | re.MULTILINE)
_STEP = re.compile(r"(?<=[.!?])\s+(?=[^\s\d])|\n+")

DIVERSIFY = (
    "Here is a problem with a solution. If there are two more correct ways to solve it, write ACCEPT and then the two, "
    "each with a heading: Solution 1: and Solution 2:, each ending with its result. If not, write REFUSE.\n\n"
)
EXPAND = (
    "Here is a problem with a solution. Say the problem as a statement, then make two new problems from it, with their "
    "solutions. Write 'Problem: ...' and below it 'Solution: ...' for each; end each solution with its result.\n\n"
)
SOLVE = "Solve this problem step by step and end with the result.\n\nProblem: "
TEACH = (
    "You are a teacher. Here is a problem, its correct result, and a student's attempt. Write CORRECT if it is right. "
    "If it is wrong, write WRONG, name the first wrong step, mend it, and go on from there to the result.\n\n"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    op: str = "tutor"  # diversify, expand, retrospect or tutor
    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.op not in OPERATORS:
            raise ValueError(f"op={self.op} is none of {', '.join(OPERATORS)}")


def problem_of(text: str) -> tuple[str, str] | None:
    """(problem, solution) of a seed; None where there are not both."""
    match = _ANSWER.search(text)
    if not match:
        return None
    problem, solution = _QUESTION.sub("", text[: match.start()]).strip(), text[match.end() :].strip()
    return (problem, solution) if problem and solution else None


def answer_of(solution: str) -> float | None:
    """The result that a solution comes to: the number after ####, or else the last one."""
    marked = _FINAL.findall(solution)
    numbers = marked or _NUMBER.findall(solution)
    return float(numbers[-1].replace(",", "").replace("\u2212", "-")) if numbers else None


def same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) <= 1e-6 * max(1.0, abs(a), abs(b))


def steps_of(solution: str) -> list[str]:
    return [s.strip() for s in _STEP.split(solution) if s.strip()]


def retrospect(solution: str, rng: np.random.Generator) -> str | None:
    """The solution with one of its later steps too early, the mark, and the right way on; None for fewer than 3
    steps."""
    steps = steps_of(solution)
    if len(steps) < 3:
        return None
    at = int(rng.integers(1, len(steps) - 1))  # steps before it stand
    early = int(rng.integers(at + 1, len(steps)))
    return "\n".join([*steps[:at], steps[early], BACK, *steps[at:]])


class MathSynthesis(Rewriter):
    config: Config

    @property
    def asks(self) -> dict[str, float]:
        return sampling(self.config)

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        seed = problem_of(document.text)
        if seed is None:
            return [document]
        op = self.config.op
        if op == "retrospect":
            text = retrospect(seed[1], rng)
            if text is None:
                return [document, Drop(f"{document.id}#{self.key}0", "too-short", "fewer than 3 steps")]
            return [document, self.made(document, f"Problem: {seed[0]}\nSolution: {text}", "0")]
        if answer_of(seed[1]) is None and op != "expand":
            return [document, Drop(f"{document.id}#{self.key}0", "no-result", "the seed's solution has no number")]
        results = yield from {"diversify": self._diversify, "expand": self._expand, "tutor": self._tutor}[op](*seed)
        out: list[Document | Drop] = [document]
        for k, result in enumerate(results):
            made = self.made(document, result if isinstance(result, str) else "", f"{k}")
            out.append(made if isinstance(result, str) else Drop(made.id, *result))
        return out

    def _diversify(self, problem: str, solution: str):
        request = ask(
            f"{DIVERSIFY}Problem: {problem}\nSolution: {solution}", max_tokens=self.config.max_tokens, **self.asks
        )
        (reply,) = yield [request]
        text = reply.text.strip()
        if not text.upper().startswith("ACCEPT"):
            word = text.split()[0] if text else "nothing"
            return [("refused", f"the reply begins with {word}, not ACCEPT")]
        ways = [w.strip() for w in _SOLUTION.split(text)[1:] if w.strip()]
        if not ways:
            return [("no-solution", "there is no Solution: in the reply")]
        return [self._checked(problem, way, solution) for way in ways[:2]]

    def _expand(self, problem: str, solution: str):
        request = ask(
            f"{EXPAND}Problem: {problem}\nSolution: {solution}", max_tokens=self.config.max_tokens, **self.asks
        )
        (reply,) = yield [request]
        made = [problem_of(part) for part in re.split(r"^(?=problem\s*\d*\s*:)", reply.text, flags=re.I | re.M)]
        pairs = [pair for pair in made if pair is not None and answer_of(pair[1]) is not None][:2]
        if not pairs:
            return [("no-problem", "there is no new problem with a result in the reply")]
        again: list[Reply] = yield [
            ask(SOLVE + new, max_tokens=self.config.max_tokens, **self.asks) for new, _ in pairs
        ]
        return [self._checked(new, way, check.text) for (new, way), check in zip(pairs, again, strict=True)]

    def _tutor(self, problem: str, solution: str):
        (attempt,) = yield [ask(SOLVE + problem, max_tokens=self.config.max_tokens, **self.asks)]
        tried = attempt.text.strip()
        if same(answer_of(tried), answer_of(solution)):
            return [f"Problem: {problem}\nAttempt: {tried}\nTeacher: CORRECT"]
        given = f"{TEACH}Problem: {problem}\nResult: {answer_of(solution):g}\nAttempt: {tried}"
        (taught,) = yield [ask(given, max_tokens=self.config.max_tokens, **self.asks)]
        text = taught.text.strip()
        if not text.upper().startswith("WRONG"):
            return [("wrong-verdict", "the attempt is wrong and the teacher does not say so")]
        if not same(answer_of(text), answer_of(solution)):
            return [("wrong-result", f"the teacher comes to {answer_of(text)}, right is {answer_of(solution):g}")]
        return [f"Problem: {problem}\nAttempt: {tried}\nTeacher: {text}"]

    @staticmethod
    def _checked(problem: str, way: str, other: str) -> str | tuple[str, str]:
        """The record, where both solutions come to the same result."""
        if not same(answer_of(way), answer_of(other)):
            return "wrong-result", f"{answer_of(way)}, the other solution comes to {answer_of(other)}"
        return f"Problem: {problem}\nSolution: {way}"
