"""social-iqa: what people feel, want and do in everyday situations, three choices.

    Q: {context} {question}
    A: {choice}

The main figure is acc. The file has the data set's columns (context, question, answerA to answerC, label from 1) or
context, question, choices, answer; the published figures are of its 1,954 validation rows.

Sap et al. 2019, arXiv:1904.09728. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks social-iqa --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""

    normalise: str = "none"


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class SocialIQA(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        query = f"{row.get('context') or ''} {first(row, ('question',), where)}".strip()
        if "answerA" in row:
            choices, answer = [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]) - 1
        else:
            choices, answer = first(row, ("choices",), where), first(row, ("answer",), where)
        return Question(f"Q: {query}\nA:", choices, answer)
