"""medmcqa: questions of Indian medical entrance examinations, four choices, answered by a letter.

    Question: {question}
    Choices:
    A. {choice} ... D. {choice}
    Answer: {letter}

The main figure is acc. The file has the data set's columns (question, opa to opd, cop) or question, choices, answer;
the published figures are of its 4,183 validation rows.

Pal et al. 2022, arXiv:2203.14371. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import LetterConfig, MultipleChoice, Question, first

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks medmcqa --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(LetterConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class MedMCQA(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        if "opa" in row:
            choices, answer = [row[f"op{letter}"] for letter in "abcd"], row["cop"]
        else:
            choices, answer = first(row, ("choices",), where), first(row, ("answer",), where)
        return Question(f"Question: {first(row, ('question',), where)}\nChoices:\nAnswer:", choices, answer)
