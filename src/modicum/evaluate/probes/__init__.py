"""port probe: what a benchmark's single figure hides: asked with a stated number of graded items, with intervals.

A probe is built from its config alone. `run` gets questions and a grader, asks the grader for gradings of versions of
the questions until its budget is spent, and gives a `Report`. The grader (`grader` makes one of a model) counts and
keeps what it grades, so a probe that was stopped goes on without asking again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modicum.core.errors import UserError
from modicum.core.files import fingerprint
from modicum.core.registry import Method
from modicum.evaluate.tasks import Choose

if TYPE_CHECKING:
    from modicum.evaluate.answer import Answerer
    from modicum.evaluate.kept import Kept

BASELINE = "plain"


@dataclass(frozen=True)
class Item:
    """A multiple-choice question as its parts, so that a probe may write it anew. right: index of the right choice."""

    id: str
    question: str
    choices: tuple[str, ...]
    right: int
    model: str = ""  # for tables of several models
    compute: float | None = None


@dataclass(frozen=True)
class Asked:
    """One version of an item: the text before the choices, and the choices as they are scored."""

    item: Item
    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Graded:
    """right: whether the likeliest choice per byte is the right one; nats of each choice."""

    right: bool
    nats: tuple[float, ...]


Grader = Callable[[Sequence[Asked]], list[Graded]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """figures: {name: {value, low, high}}; detected: whether the effect that the probe looks for is there."""

    figures: dict[str, dict[str, float]]
    detected: bool
    verdict: str
    graded: int
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)


class Probe(Method):
    """Base of every probe. needs: what its grader must know, "likelihoods" or "gradients" (`evaluate.curvature`)."""

    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[str] = "likelihoods"

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def run(self, items: Sequence[Item], grade: Grader, budget: int, seed: int = 0) -> Report:
        """Spend at most `budget` gradings. Raises UserError where budget or items do not suffice."""

    @abstractmethod
    def simulate(self, rng: np.random.Generator, effect: bool) -> tuple[list[Item], Grader, int]:
        """Items, a grader and a budget of a simulated model with or without the effect: for the conformance suite."""


def prompt_of(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def ask(item: Item, question: str | None = None) -> Asked:
    """The usual version of an item, or with its question in other words."""
    return Asked(item, prompt_of(question or item.question), tuple(f" {c}" for c in item.choices))


def grader(answerer: Answerer, kept: Kept, common: Sequence[Any]) -> Grader:
    """Gradings by a model: requests already in `kept` (under `common`, which names the model) are not asked again."""

    def grade(prompts: Sequence[Asked]) -> list[Graded]:
        keys = [fingerprint(["probe", *common, a.prompt, a.choices, a.item.right]) for a in prompts]
        todo = {key: a for key, a in zip(keys, prompts, strict=True) if key not in kept}
        replies = answerer.answers([Choose(a.prompt, a.choices) for a in todo.values()])
        for (key, a), reply in zip(todo.items(), replies, strict=True):
            nats = [float(s.nats) for s in reply]
            sizes = [max(1, len(c.strip().encode())) for c in a.choices]
            best = int(np.argmax(np.array(nats) / sizes))
            kept.add(key, {"right": best == a.item.right, "nats": nats}, id=a.item.id)
        return [Graded(bool(kept[key]["right"]), tuple(kept[key]["nats"])) for key in keys]

    return grade


def grader_of(probe: Probe, answerer: Answerer, kept: Kept, common: Sequence[Any]) -> Grader:
    """The grader that a probe needs, of the answerer's model."""
    if probe.needs == "gradients":
        from modicum.evaluate import curvature

        return curvature.grader(answerer.model, answerer.tokenizer, kept, common, probes=probe.config.probes)
    return grader(answerer, kept, common)


def items_of(rows: Iterable[dict[str, Any]]) -> list[Item]:
    """Items of a multiple-choice task's documents ({id, prompt, choices, answer}), the question alone."""
    items = []
    for row in rows:
        question = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:").strip()
        items.append(Item(str(row["id"]), question, tuple(row["choices"]), int(row["answer"])))
    if not items:
        raise UserError("there are no multiple-choice items to probe; give a task such as arc-easy")
    return items
