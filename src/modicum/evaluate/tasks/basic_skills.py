"""basic-skills: easy questions of arithmetic, logic, spelling, patterns and common knowledge.

    Question: {question}
    Answer: {choice}

Small models can learn these, so the curve along training moves early; ten choices or fewer. The main figure is
acc_norm; items of one skill form a cluster. The file has question, choices, answer, subject.

OLMo in-loop evaluations (Allen Institute for AI, 2025). Wording is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, labelled

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks basic-skills --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class BasicSkills(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        question, choices, answer = labelled(row, where)
        skill = row.get("subject")
        return Question(f"Question: {question}\nAnswer:", choices, answer, None if skill is None else str(skill))
