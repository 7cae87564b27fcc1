"""scale-tts: split a problem into ordered sub-problems, and think slowly only about those that are hard.

    1  outlines o_1 .. o_8 are sampled, ordered lists of sub-problems; the model picks the most coherent
    2  each sub-problem gets a difficulty d_i in [0, 1], given the problem and the outline
    3  mode_i = slow (reasoning, long budget) if d_i > threshold, else fast
    4  in order, each prompt holds the problem and all earlier sub-problems with their answers, never their reasoning;
       the last answer is the problem's

The calls of 1 and 2 are generations like others and count. An outline that cannot be parsed is sampled again `retries`
times, then the problem is answered greedily. `outline=given` takes the problem's own steps; `difficulty=uncertainty`
answers each sub-problem fast and takes d_i = 1 - exp(-nats / tokens) of that answer, which is also the fast mode's.
threshold below 0 thinks about everything, 1 about nothing.

arXiv:2512.00466 (AAAI 2026); written from an account of its abstract and of the authors' README, not from the
paper. Departs: the difficulty by uncertainty and given outlines are this project's, for models too small to write
outlines; where the model has no switch for thinking, the slow mode is a sentence after the prompt.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator
from dataclasses import dataclass

from modicum.evaluate.solvers import Attempt, Call, Problem, Reply, Solver

CLAIM = {
    "figure": "AIME25 57.5 to 71.3%, at 33 to 53% less than uniform scaling",
    "where": "abstract",
    "scale": "7B to 32B parameters",
}
SWEEP = {"outline": ("given",), "difficulty": ("uncertainty",), "threshold": (-1.0, 0.1, 0.3, 0.5, 0.7, 1.0)}
OUTLINE = (
    "\n\nSplit this problem into at most {most} sub-problems, to be answered one after another, the last of which "
    "gives the final answer. Reply with a JSON list of strings and nothing else."
)
PICK = "\n\nOutlines of a solution:\n{outlines}\nWhich of them is the most coherent? Reply with its number."
RATE = (
    "\n\nOutline of a solution:\n{outline}\nHow difficult is sub-problem {number}, {step!r}? Reply with a number "
    "between 0 (trivial) and 1 (very difficult)."
)
NUMBER = re.compile(r"\d*\.?\d+")
Outline = Generator[Call, list[Reply], list[str]]


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.5  # a sub-problem above it is thought about
    outlines: int = 8  # samples to pick from
    temperature: float = 0.6  # of the outlines
    most: int = 8  # sub-problems of an outline
    retries: int = 2
    outline: str = "generated"  # or given: the problem's own steps
    difficulty: str = "score"  # or uncertainty: of a fast answer
    outline_tokens: int = 256
    slow_tokens: int = 0  # of a slow answer; 0: what the problem allows

    def __post_init__(self) -> None:
        if self.outline not in ("generated", "given") or self.difficulty not in ("score", "uncertainty"):
            raise ValueError("outline must be generated or given, difficulty score or uncertainty")
        if self.outlines < 1 or self.most < 1 or self.retries < 0 or self.outline_tokens < 1 or self.slow_tokens < 0:
            raise ValueError("outlines, most and outline_tokens must be at least 1, retries and slow_tokens 0 or more")


class ScaleTts(Solver):
    config: Config

    def attempt(self, problem: Problem) -> Attempt:
        steps = yield from self._outline(problem)
        if not steps:
            (reply,) = yield Call(problem.prompt, final=True)
            return reply.text
        solved: list[tuple[str, str]] = []
        text = ""
        for i in range(len(steps)):
            step = filled(steps[i], [answer for _, answer in solved])
            prompt = problem.layout(problem.prompt, solved, step)
            text = yield from self._step(problem, prompt, steps, i)
            solved.append((step, problem.extract(text)))
        return text

    def _outline(self, problem: Problem) -> Outline:
        c = self.config
        if c.outline == "given":
            return list(problem.steps)
        prompt = problem.prompt + OUTLINE.format(most=c.most)
        for _ in range(1 + c.retries):
            replies = yield Call(prompt, c.outlines, c.temperature, c.outline_tokens, stop=(), wrap=True)
            outlines = list(dict.fromkeys(outline for r in replies if (outline := parsed(r.text, c.most))))
            if outlines:
                return list((yield from self._picked(problem, outlines)))
        return []

    def _picked(self, problem: Problem, outlines: list[tuple[str, ...]]) -> Outline:
        if len(outlines) == 1:
            return list(outlines[0])
        listed = "\n".join(f"[{i}] {'; '.join(outline)}" for i, outline in enumerate(outlines, 1))
        prompt = problem.prompt + PICK.format(outlines=listed)
        (reply,) = yield Call(prompt, max_new_tokens=8, stop=(), wrap=True)
        number = re.search(r"\d+", reply.text)
        index = int(number[0]) - 1 if number and 1 <= int(number[0]) <= len(outlines) else 0
        return list(outlines[index])

    def _step(self, problem: Problem, prompt: str, steps: list[str], i: int) -> Attempt:
        """The reply to a sub-problem, in the mode that its difficulty asks for."""
        c, last = self.config, i == len(steps) - 1
        fast = Call(prompt, final=last)
        slow = Call(prompt, max_new_tokens=c.slow_tokens or None, think=True, final=last)
        if c.difficulty == "uncertainty":
            if c.threshold < 0:  # whatever the fast answer's, it is above
                (reply,) = yield slow
                return reply.text
            (reply,) = yield fast
            if not uncertainty(reply) > c.threshold:
                return reply.text
            (reply,) = yield slow
            return reply.text
        outline = "\n".join(f"{k}. {step}" for k, step in enumerate(steps, 1))
        rate = RATE.format(outline=outline, number=i + 1, step=steps[i])
        (score,) = yield Call(problem.prompt + rate, max_new_tokens=8, stop=(), wrap=True)
        (reply,) = yield slow if difficulty(score.text) > c.threshold else fast
        return reply.text


def uncertainty(reply: Reply) -> float:
    """One minus the geometric mean of the tokens' probabilities."""
    return 1 - math.exp(-reply.nats / max(reply.tokens, 1))


def difficulty(text: str) -> float:
    """The first number of a reply, within [0, 1]; a reply without one counts as difficult."""
    number = NUMBER.search(text)
    return min(float(number[0]), 1.0) if number else 1.0


def parsed(text: str, most: int) -> tuple[str, ...]:
    """The sub-problems of an outline, the first `most`; empty where the reply holds no JSON list of texts."""
    for begin in (m.start() for m in re.finditer(r"\[", text)):
        try:
            rows, _ = json.JSONDecoder().raw_decode(text[begin:])
        except json.JSONDecodeError:
            continue
        if isinstance(rows, list) and rows and all(isinstance(row, str) and row.strip() for row in rows):
            return tuple(row.strip() for row in rows[:most])
    return ()


def filled(step: str, answers: list[str]) -> str:
    """A step with `{0}`, `{1}` replaced by earlier answers; other braces stay."""
    return re.sub(r"\{(\d+)\}", lambda m: answers[int(m[1])] if int(m[1]) < len(answers) else m[0], step)
