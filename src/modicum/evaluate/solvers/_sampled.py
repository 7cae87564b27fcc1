"""Solvers that sample several replies to the whole question and choose one of them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from modicum.evaluate.solvers import Call, Problem, Reply


@dataclass(frozen=True, kw_only=True)
class Config:
    n: int = 5  # samples
    temperature: float = 0.7
    think: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.temperature <= 0:
            raise ValueError("n must be at least 1, temperature above 0 (there is no choice between equal replies)")


def sample(config: Config, problem: Problem) -> Generator[Call, list[Reply], list[Reply]]:
    """`n` replies to the question; each of them may be the answer."""
    return (yield Call(problem.prompt, config.n, config.temperature, think=config.think, final=True))


def nats_per_token(reply: Reply) -> float:
    return reply.nats / max(reply.tokens, 1)
