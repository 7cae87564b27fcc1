"""Multiple choice in the cloze form: the choice that is likeliest after the question wins.

    acc        argmax_i log p(choice_i | question)                  no normalisation
    acc_norm   argmax_i log p(choice_i | question) / bytes_i        UTF-8 bytes, the space before it left out
    acc_token  argmax_i log p(choice_i | question) / tokens_i

`nats` is the negative log-likelihood of the right choice, which moves before accuracies do. In ASCII text acc_norm is
lm-evaluation-harness's and lighteval's, which count characters (Gao et al., lm-evaluation-harness; lighteval's
`LogProbCharNorm`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.rows import FileConfig, rows_of
from modicum.evaluate.tasks import Choose, Doc, Task

FIGURES = {"bytes": "acc_norm", "tokens": "acc_token", "none": "acc"}  # by what the main figure divides by


def check_normalise(normalise: str) -> None:
    if normalise not in FIGURES:
        raise ValueError(f"normalise={normalise!r}: allowed are {', '.join(FIGURES)}")


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig(FileConfig):
    normalise: str = "bytes"  # what the main figure divides by: bytes, tokens, none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_normalise(self.normalise)


@dataclass(frozen=True)
class Question:
    """answer: an index from 0, a letter from A, or one of the choices."""

    prompt: str
    choices: Sequence[Any]
    answer: Any


class MultipleChoice(Task):
    """Base of the tasks on files of questions: a subclass writes `question(row)`."""

    config: Any
    version = 2

    @property
    def metric(self) -> str:  # type: ignore[override]
        return FIGURES[self.config.normalise]

    @abstractmethod
    def question(self, row: dict[str, Any], where: str) -> Question:
        """What is asked about a row of the file; `where` names the row in errors."""

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        for number, row in rows_of(self.config, split, limit, seed):
            where = f"{self.config.file}, row {number}"
            asked = self.question(row, where)
            if not isinstance(asked.choices, list | tuple) or len(asked.choices) < 2:
                raise UserError(f"{where}: the choices are {asked.choices!r}; they must be a list of two or more texts")
            choices = [str(choice) for choice in asked.choices]
            yield {
                "id": str(row.get("id", number)),
                "prompt": asked.prompt,
                "choices": choices,
                "answer": index_of(asked.answer, choices, where),
            }

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        before = "".join(self.text(shot) + "\n\n" for shot in shots)
        return [Choose(before + doc["prompt"], tuple(" " + choice for choice in doc["choices"]))]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        scores, right = replies[0], doc["answer"]
        nats = np.array([s.nats for s in scores])
        sizes = {
            "acc": np.ones(len(nats)),
            "acc_norm": np.array([max(1, len(c.encode("utf-8", "surrogatepass"))) for c in doc["choices"]]),
            "acc_token": np.array([s.tokens for s in scores]),
        }
        figures = {name: float((nats / size).argmax() == right) for name, size in sizes.items()}
        return figures | {"nats": float(-nats[right])}

    def text(self, doc: Doc) -> str:
        return f"{doc['prompt']} {doc['choices'][doc['answer']]}"


def index_of(answer: Any, choices: Sequence[str], where: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().isalpha():
        answer = ord(answer.strip().upper()) - ord("A")
    try:
        index = int(answer)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(choices):
        raise UserError(
            f"{where}: the answer {answer!r} is no index from 0 to {len(choices) - 1}, no letter from A "
            "and none of the choices; name the right column with answer=COLUMN"
        )
    return index


def first(row: dict[str, Any], columns: Sequence[str], where: str) -> Any:
    """The value of the first of `columns` that a row has. Raises UserError where it has none."""
    for column in columns:
        if row.get(column) is not None:
            return row[column]
    raise UserError(
        f"{where} has none of the columns {', '.join(columns)}; it has {', '.join(row)}. "
        "For files of another layout use choice:file=..., whose knobs name the columns"
    )


def labelled(row: dict[str, Any], where: str) -> tuple[str, list[Any], Any]:
    """(question, choices, answer) of a row whose choices may be {"text": [...], "label": [...]} with an `answerKey`."""
    question, choices = first(row, ("question",), where), first(row, ("choices",), where)
    answer = first(row, ("answerKey", "answer"), where)
    if isinstance(choices, dict):
        labels = [str(label) for label in choices["label"]]
        if str(answer) not in labels:
            raise UserError(f"{where}: the answer {answer!r} is none of the labels {', '.join(labels)}")
        return str(question), list(choices["text"]), labels.index(str(answer))
    return str(question), choices, answer
