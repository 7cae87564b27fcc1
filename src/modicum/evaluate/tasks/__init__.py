"""port task: what a model is asked, and how its answers are graded.

A task is built from its config alone. It gives documents (dicts with an `id`), turns one document into
requests, and grades the replies to them; the runner (`evaluate.run`) does the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modicum.core.registry import Method

BASELINE = "needle"
Doc = dict[str, Any]
Reply = Any  # to Generate: the text; to Choose: a list of score.LogLikelihood, one per choice


@dataclass(frozen=True)
class Generate:
    """Greedy text after `prompt`, until a stop string or `max_new_tokens`.

    lead: how the answer's sentence begins. Where a chat template makes the prompt a user's message, the
    assistant's begins with this, so that it goes on as the plain prompt would.
    steps: an outline of sub-problems for solvers that take one; `{0}` stands for the first one's answer.
    """

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ("\n",)
    lead: str = ""
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choose:
    """The likelihood of each of `choices` (with their leading space) after `prompt`, or after its own of `before`."""

    prompt: str
    choices: tuple[str, ...]
    before: tuple[str, ...] = ()


class Task(Method):
    """Base of every task.

    version: raised when the task's questions or grading change, so that kept results are not mixed.
    whole: whether a prompt longer than the model's context is refused instead of losing its beginning.
    metric: the name of the main figure in `grade`, between 0 and 1.
    """

    version: ClassVar[int] = 1
    whole: ClassVar[bool] = False
    metric: ClassVar[str] = "accuracy"

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        """Documents of "train" or "test", the first `limit` of them; the same for the same seed."""

    @abstractmethod
    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Generate | Choose]:
        """What to ask about `doc`, after the solved examples `shots`."""

    @abstractmethod
    def grade(self, doc: Doc, replies: Sequence[Reply]) -> dict[str, float]:
        """Figures for one document; `metric` is among them."""

    def chance(self, doc: Doc) -> float | None:
        """What a guess among the answers that are named scores on average in `metric`; None where nothing is named."""
        return None

    def extract(self, reply: str) -> str:
        """The answer in a reply, by which replies are compared (votes); "" where it holds none."""
        return " ".join(reply.lower().split())

    @abstractmethod
    def text(self, doc: Doc) -> str:
        """The document with its right answer, as a model would read it in training."""

    def aggregate(self, rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
        """For each figure its mean and the standard error of the mean over documents."""
        figures = {}
        for name in rows[0] if rows else ():
            values = np.array([row[name] for row in rows], dtype=float)
            spread = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
            figures[name] = {"value": float(values.mean()), "stderr": spread, "documents": len(values)}
        return figures
