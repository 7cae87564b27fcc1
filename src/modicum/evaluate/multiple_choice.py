"""Multiple choice by likelihood, with every normalisation side by side from one pass.

    acc         argmax_i log p(choice_i | question)                  no normalisation
    acc_norm    argmax_i log p(choice_i | question) / bytes_i        UTF-8 bytes, the space before it left out
    acc_char    the same over characters, which lm-evaluation-harness calls acc_norm
    acc_token   the same over tokens
    acc_pmi     argmax_i log p(choice_i | question) - log p(choice_i | "Answer:"), with pmi=true: a second pass
    prob        p_right / sum_i p_i, of whole choices;               brier its squared error over the choices

`nats` is the negative log-likelihood of the right choice and `bits_per_byte` the same by the bytes that were scored,
its space included: both move before accuracies do. A question is asked in one of three forms: `cloze` (the choice's
text is scored after the question), `letters` (the choices are listed, their letters scored), `hybrid` (listed, their
text scored).

Gao et al., lm-evaluation-harness; Holtzman et al. 2021, arXiv:2104.08315 (PMI).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.rows import FileConfig, rows_of
from modicum.evaluate.tasks import Choose, Doc, Task

FIGURES = {"bytes": "acc_norm", "characters": "acc_char", "tokens": "acc_token", "none": "acc", "pmi": "acc_pmi"}
FORMS = ("cloze", "letters", "hybrid")
NOTHING = "Answer:"  # what PMI's unconditional likelihood stands after


def check_choice(normalise: str, form: str, pmi: bool) -> None:
    """Raises ValueError for knobs that are not allowed, or not together."""
    if normalise not in FIGURES:
        raise ValueError(f"normalise={normalise!r}: allowed are {', '.join(FIGURES)}")
    if normalise == "pmi" and not pmi:
        raise ValueError("normalise=pmi needs pmi=true, which scores every choice a second time without its question")
    if form not in FORMS:
        raise ValueError(f"form={form!r}: allowed are {', '.join(FORMS)}")


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig(FileConfig):
    normalise: str = "bytes"  # what the main figure divides by: bytes, characters, tokens, none, pmi
    form: str = "cloze"  # cloze, letters or hybrid
    pmi: bool = False  # score the choices without the question too

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.normalise, self.form, self.pmi)


@dataclass(frozen=True, kw_only=True)
class LetterConfig(ChoiceConfig):
    """Of a task whose wording lists the choices and asks for a letter: nothing is there to normalise by."""

    normalise: str = "none"
    form: str = "letters"


@dataclass(frozen=True)
class Question:
    """answer: an index from 0, a letter from A, or one of the choices; cluster: what the item shares with others.

    before: where each choice stands in a text of its own (a blank that it fills), the text before the scored part.
    """

    prompt: str
    choices: Sequence[Any]
    answer: Any
    cluster: str | None = None
    before: tuple[str, ...] = ()


class MultipleChoice(Task):
    """Base of the tasks on files of questions: a subclass writes `question(row)`.

    delimiter: what stands between a question and a choice, as in the wording that is followed.
    """

    config: Any
    version = 3
    delimiter: ClassVar[str] = " "

    @property
    def metric(self) -> str:  # type: ignore[override]
        return FIGURES[self.config.normalise]

    @abstractmethod
    def question(self, row: dict[str, Any], where: str) -> Question:
        """What is asked about a row of the file; `where` names the row in errors."""

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        for number, row in rows_of(self.config, split, limit, seed):
            where = f"{self.config.file}, row {number}"
            posed = self.question(row, where)
            if not isinstance(posed.choices, list | tuple) or len(posed.choices) < 2:
                raise UserError(f"{where}: the choices are {posed.choices!r}; they must be a list of two or more texts")
            choices = [str(choice) for choice in posed.choices]
            doc = {
                "id": str(row.get("id", number)),
                "prompt": posed.prompt,
                "choices": choices,
                "answer": index_of(posed.answer, choices, where),
            }
            form = getattr(self.config, "form", "cloze")
            if form != "cloze" and not posed.before:
                listed = "".join(f"{chr(ord('A') + i)}. {choice}\n" for i, choice in enumerate(choices))
                head, last = self._split(posed.prompt)
                doc |= {"prompt": f"{head}\n{listed}{last}"}
                if form == "letters":
                    doc |= {"choices": [chr(ord("A") + i) for i in range(len(choices))]}
            if posed.cluster is not None:
                doc |= {"cluster": posed.cluster}
            yield doc | ({"before": posed.before} if posed.before else {})

    @staticmethod
    def _split(prompt: str) -> tuple[str, str]:
        """The question, and the line that asks for the answer."""
        for last in ("Answer:", "A:"):
            if prompt.endswith(f"\n{last}"):
                return prompt.removesuffix(f"\n{last}"), last
        return prompt, "Answer:"

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        before = "".join(self.text(shot) + "\n\n" for shot in shots)
        choices = tuple(self.delimiter + choice for choice in doc["choices"])
        own = tuple(before + text for text in doc.get("before", ()))
        posed = [Choose(before + doc["prompt"], choices, own)]
        return posed + ([Choose(NOTHING, choices)] if getattr(self.config, "pmi", False) else [])

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        scores, right = replies[0], doc["answer"]
        nats = np.array([s.nats for s in scores])
        sizes = {
            "acc": np.ones(len(nats)),
            "acc_norm": np.array([max(1, len(c.encode("utf-8", "surrogatepass"))) for c in doc["choices"]]),
            "acc_char": np.array([max(1, len(c)) for c in doc["choices"]]),
            "acc_token": np.array([s.tokens for s in scores]),
        }
        figures = {name: float((nats / size).argmax() == right) for name, size in sizes.items()}
        if len(replies) > 1:
            figures["acc_pmi"] = float((nats - np.array([s.nats for s in replies[1]])).argmax() == right)
        fraction = np.exp(nats - nats.max())
        fraction /= fraction.sum()
        brier = float(((fraction - (np.arange(len(fraction)) == right)) ** 2).sum())
        return figures | {
            "prob": float(fraction[right]),
            "brier": brier,
            "nats": float(-nats[right]),
            "bits_per_byte": float(-nats[right] / math.log(2) / scores[right].nbytes),
        }

    def chance(self, doc: Doc) -> float:
        return 1 / len(doc["choices"])

    def text(self, doc: Doc) -> str:
        prompt = doc["before"][doc["answer"]] if "before" in doc else doc["prompt"]
        return f"{prompt}{self.delimiter}{doc['choices'][doc['answer']]}"


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
