"""medqa: cases of United States medical licensing examinations, answered by a letter.

    Question: {question}
    A. {choice} ... E. {choice}
    Answer: {letter}

The main figure is acc. The file has question, choices, answer; 1,273 test rows.

Jin et al. 2021, arXiv:2009.13081. Wording of lm-evaluation-harness, whose task keeps four of the five choices; here
all that the file has are listed, so its figures are comparable with those of five choices only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import LetterConfig, MultipleChoice, Question, labelled

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks medqa --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(LetterConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class MedQA(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        question, choices, answer = labelled(row, where)
        return Question(f"Question: {question}\nAnswer:", choices, answer)
