"""commonsense-qa: everyday questions with five choices, listed and answered by a letter.

    Question: {question}
    A. {choice} ... E. {choice}
    Answer: {letter}

The main figure is acc over the letters; `form=cloze` scores the choices' texts after the question instead. The file
has the data set's columns or question, choices, answer; the published figures are of its 1,221 validation rows.

Talmor et al. 2019, arXiv:1811.00937. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import LetterConfig, MultipleChoice, Question, labelled

NOT_MEASURABLE = "its questions are no part of modicum; ask them by modicum eval --tasks commonsense-qa"


@dataclass(frozen=True, kw_only=True)
class Config(LetterConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class CommonsenseQA(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        question, choices, answer = labelled(row, where)
        return Question(f"Question: {question.strip()}\nAnswer:", choices, answer)
