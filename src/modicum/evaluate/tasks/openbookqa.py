"""openbookqa: elementary science questions that need a fact and a step beyond it, four choices.

    {question} {choice}

No frame stands around the question: a choice is scored as its continuation (`evaluate/multiple_choice.py`). The file
has the data set's columns (question_stem, choices, answerKey) or question, choices, answer; the published figures are
of its 500 test rows.

Mihaylov et al. 2018, arXiv:1809.02789. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, labelled

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks openbookqa --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class OpenBookQA(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        question, choices, answer = labelled({"question": row.get("question_stem")} | row, where)
        return Question(question, choices, answer)
