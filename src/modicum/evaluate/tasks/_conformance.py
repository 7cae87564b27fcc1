"""What must hold for any task: the same questions for the same seed, grading that knows right from wrong."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from modicum.core import registry
from modicum.evaluate.score import LogLikelihood
from modicum.evaluate.tasks import Choose, Doc, Generate, Task


def _task(key: str) -> Task:
    loaded = registry.load("task", key)
    task: Task = loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())
    return task


def _docs(task: Task, split: str = "test", limit: int | None = 6, seed: int = 0) -> list[Doc]:
    return list(task.docs(split, limit, seed))


def _replies(task: Task, doc: Doc, right: bool) -> list[Any]:
    """What a model that knows the answer (or is wrong everywhere) would reply, read off the solved text."""
    replies: list[Any] = []
    for request in task.requests(doc, []):
        if isinstance(request, Generate):
            rest = task.text(doc)
            rest = rest[len(request.prompt) :] if rest.startswith(request.prompt) else rest
            ends_at = [rest.find(s) for s in request.stop if s and rest.find(s) >= 0]
            replies.append(rest[: min(ends_at)] if ends_at else rest)
            if not right:
                replies[-1] = " nothing of the kind"
        else:
            solved = task.text(doc)
            if request.before:
                ends = [before + c for before, c in zip(request.before, request.choices, strict=True)]
            else:
                ends = list(request.choices)
            # A single choice may stand anywhere in the text: its likelihood is wanted, not a comparison.
            last = [i for i, c in enumerate(ends) if solved.endswith(c) or len(ends) == 1]
            best = max(last, key=lambda i: len(ends[i]))
            replies.append(
                [
                    LogLikelihood(-0.1 if (i == best) == right else -200.0, (i == best) == right, 1, len(c.encode()))
                    for i, c in enumerate(request.choices)
                ]
            )
    return replies


def check_same_seed_same_documents(key: str) -> None:
    task = _task(key)
    first, again = _docs(task), _docs(task)
    assert first == again, "the same seed gave other documents"
    assert len(first) >= 2, "a toy task needs at least two documents"
    assert _docs(task, limit=2) == first[:2], "a smaller limit is not a prefix of a larger one"
    ids = [doc["id"] for doc in first]
    assert len(set(ids)) == len(ids), f"ids repeat: {ids}"


def check_other_seed_or_split(key: str) -> None:
    """A generated task must change with the seed and between the splits; one read from a file need not."""
    task = _task(key)
    if hasattr(task.config, "file"):
        return
    base = {doc["prompt"] for doc in _docs(task)}
    assert not base & {doc["prompt"] for doc in _docs(task, seed=1)}, "another seed gives the same questions"
    assert not base & {doc["prompt"] for doc in _docs(task, split="train")}, "train questions are in the test"


def check_requests(key: str) -> None:
    task = _task(key)
    for doc in _docs(task):
        plain = task.requests(doc, [])
        assert plain, "a document must ask for something"
        for request in plain:
            assert isinstance(request, Generate | Choose), f"{request!r} is no request"
            assert request.prompt or isinstance(request, Choose), "there is nothing to answer"
            assert request.prompt == request.prompt.rstrip(" "), (
                "a prompt must not end with a space: the tokens of the answer would differ from the text's"
            )
            if isinstance(request, Generate):
                assert request.max_new_tokens > 0
            else:
                assert request.choices and all(request.choices)
                assert len(request.before) in (0, len(request.choices))


def check_shots_come_first(key: str) -> None:
    task = _task(key)
    doc, *shots = _docs(task, limit=3)
    plain, with_shots = task.requests(doc, []), task.requests(doc, shots)
    for a, b in zip(plain, with_shots, strict=True):
        question = a.prompt.removeprefix(getattr(task, "description", ""))
        assert b.prompt.endswith(question), "the question is not at the end"
        for shot in shots if not getattr(a, "prompt", "").startswith("Answer:") else ():
            assert task.text(shot).removeprefix(getattr(task, "description", "")) in b.prompt, (
                "an example is not in the prompt with its answer"
            )


def check_grading(key: str) -> None:
    task = _task(key)
    for doc in _docs(task):
        good = task.grade(doc, _replies(task, doc, True))
        assert good[task.metric] == 1.0, f"the right answer of {doc['id']} is graded {good}"
        bad = task.grade(doc, _replies(task, doc, False))
        assert bad[task.metric] == 0.0, f"a wrong answer of {doc['id']} is graded {bad}"
        assert bad.keys() == good.keys()
        if all(isinstance(r, Generate) for r in task.requests(doc, [])):
            empty = task.grade(doc, ["" for _ in task.requests(doc, [])])
            assert empty[task.metric] == 0.0, "an empty reply is graded as right"


def check_aggregate(key: str) -> None:
    task = _task(key)
    doc = _docs(task, limit=1)[0]
    right, wrong = (task.grade(doc, _replies(task, doc, r)) for r in (True, False))
    rows = [right] * 3 + [wrong] * 7
    figure = task.aggregate(rows)[task.metric]
    values = np.array([row[task.metric] for row in rows])
    assert np.isclose(figure["value"], 0.3), f"3 of 10 right gives {figure}"
    assert np.isclose(figure["stderr"], values.std(ddof=1) / np.sqrt(10)), f"the standard error is {figure['stderr']}"


def check_training_text(key: str) -> None:
    task = _task(key)
    for doc in itertools.islice(task.docs("test", None, 0), 4):
        text, request = task.text(doc), task.requests(doc, [])[0]
        starts = getattr(request, "before", ()) or (request.prompt,)
        assert any(text.startswith(start) and len(text) > len(start) for start in starts), (
            "the training text must go on from the prompt with the answer"
        )
