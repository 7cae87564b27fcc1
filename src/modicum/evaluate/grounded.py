"""Answers with passages against answers without: the same model, the same questions, graded pairwise.

    questions = draw(q for q in data.questions.questions(documents) if split_of(q) == "test")
    result = grounded.run(engine, items(questions), searcher)
    result.figures["grounded"]["exact"]        {"value", "low", "high"}

Arms: `closed` (the question alone), `retrieved` (the passages that a search returns) and, where the right passage of
each question is known, `gold` (that passage alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.data.passages import Passage
from modicum.data.questions import Question
from modicum.evaluate import answers
from modicum.retrieve import ground
from modicum.retrieve.search import Hit, Searcher
from modicum.serve.messages import Messages, greedy_params, replies

ARMS = ("closed", "retrieved", "gold")


@dataclass(frozen=True)
class Item:
    """A question with its accepted answers. gold: ids of the passages that hold the answer, where they are known."""

    id: str
    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graded:
    """figures: {arm: {exact, f1, contains: {value, low, high}}}; paired: differences between arms; rows: every reply.

    recall: fraction of the questions whose prompt held a gold passage, None where none is known.
    """

    questions: int
    figures: dict[str, dict[str, dict[str, float]]]
    paired: list[dict[str, Any]]
    recall: float | None
    prompt_tokens: dict[str, float]
    rows: list[dict[str, Any]] = field(repr=False)

    def as_dict(self, rows: bool = False) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if rows or k != "rows"}


def items(questions: Iterable[Question]) -> list[Item]:
    return [Item(q.id, q.question, q.answers) for q in questions]


def run(
    engine: Any,
    graded_items: Sequence[Item],
    searcher: Searcher,
    *,
    arms: Sequence[str] = ("closed", "retrieved"),
    k: int = ground.PASSAGES,
    mode: str | None = None,
    prompt_budget: int | None = None,
    max_tokens: int = 32,
    events: Events | None = None,
) -> Graded:
    """Ask `engine` (one with a tokenizer) every question in every arm and grade the replies; greedy, so repeatable."""
    if not graded_items:
        raise UserError("there is no question to grade; give one or more with accepted answers")
    check_arms(arms)
    budget = ground.prompt_budget_for(k) if prompt_budget is None else prompt_budget
    prompts, shown = compose_arms(graded_items, searcher, arms, k, mode, budget, counter(engine))
    texts_of: dict[str, list[str]] = {}
    for arm in arms:
        with (events or Events()).progress(f"ask {arm}", len(graded_items), "questions") as bar:
            texts_of[arm] = replies(engine, prompts[arm], greedy_params(max_tokens), progress=bar.update)
    return grade(graded_items, texts_of, shown, {arm: _mean_tokens(engine, prompts[arm]) for arm in arms})


def check_arms(arms: Sequence[str]) -> None:
    for arm in arms:
        if arm not in ARMS:
            raise UserError(f"arm {arm!r} is not one of {', '.join(ARMS)}")
    if not arms or len(set(arms)) < len(arms):
        raise UserError(f"arms {', '.join(arms)!r} must name one or more of {', '.join(ARMS)}, each once")


def compose_arms(
    graded_items: Sequence[Item],
    searcher: Searcher,
    arms: Sequence[str],
    k: int,
    mode: str | None,
    prompt_budget: int,
    count: Callable[[str], int],
) -> tuple[dict[str, list[Messages]], list[list[str]]]:
    """(prompts of each arm, ids of the passages that each question's `retrieved` prompt shows)."""
    prompts: dict[str, list[Messages]] = {arm: [] for arm in arms}
    shown: list[list[str]] = []
    row_of = {id: row for row, id in enumerate(searcher.passages.ids())} if "gold" in arms else {}
    for item in graded_items:
        if "closed" in arms:
            prompts["closed"].append(ground.closed_book(item.question))
        if "retrieved" in arms:
            hits = searcher.search(item.question, k, mode)
            messages, sources, _ = ground.compose(item.question, hits, prompt_budget, count)
            prompts["retrieved"].append(messages)
            shown.append([source.id for source in sources])
        if "gold" in arms:
            passage: Passage = searcher.passages[_gold_row(item, row_of)]
            prompts["gold"].append(ground.compose(item.question, [Hit(passage, 1.0, {})], prompt_budget, count)[0])
    return prompts, shown


def grade(
    graded_items: Sequence[Item],
    texts_of: Mapping[str, Sequence[str]],
    shown: Sequence[Sequence[str]] = (),
    prompt_tokens: Mapping[str, float] | None = None,
) -> Graded:
    """Figures of replies by arm, in the order of `asked`; arms are compared later minus earlier."""
    graded = {
        arm: [
            answers.grade(item.question, reply, item.answers) for item, reply in zip(graded_items, texts, strict=True)
        ]
        for arm, texts in texts_of.items()
    }
    known = [bool(set(item.gold) & set(ids)) for item, ids in zip(graded_items, shown, strict=False) if item.gold]
    return Graded(
        questions=len(graded_items),
        figures={arm: answers.figures(rows) for arm, rows in graded.items()},
        paired=answers.comparisons(graded),
        recall=sum(known) / len(known) if known else None,
        prompt_tokens=dict(prompt_tokens or {}),
        rows=[
            {"id": item.id, "question": item.question, "answers": list(item.answers)}
            | {
                arm: {"reply": texts_of[arm][i], "short": answers.short_answer(item.question, texts_of[arm][i])}
                | graded[arm][i]
                for arm in texts_of
            }
            for i, item in enumerate(graded_items)
        ],
    )


def counter(engine: Any) -> Callable[[str], int]:
    """Tokens of a text by the engine's tokenizer."""
    return lambda text: len(engine.tokenizer.encode(text, specials=False))


def _mean_tokens(engine: Any, prompts: Sequence[Messages]) -> float:
    count = counter(engine)
    return sum(count(engine.tokenizer.chat(m)) for m in prompts) / max(len(prompts), 1)


def _gold_row(item: Item, row_of: Mapping[str, int]) -> int:
    for id in item.gold:
        if id in row_of:
            return row_of[id]
    raise UserError(f"question {item.id!r} has no gold passage in the index; leave the arm gold out")
