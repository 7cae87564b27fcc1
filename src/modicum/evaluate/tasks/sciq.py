"""sciq: crowdsourced science questions with four choices and, where the file has it, a supporting text.

    {support}
    Question: {question}
    Answer: {choice}

The main figure is acc_norm. The file has the data set's columns (support, question, distractor1 to 3, correct_answer)
or question, choices, answer and perhaps context; without a support the harness's prompt begins with an empty line, and
so does this. The published figures are of 1,000 test rows with their supports.

Welbl et al. 2017, arXiv:1707.06209. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks sciq --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class SciQ(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        support = str(row.get("support") or row.get("context") or "").lstrip()
        prompt = f"{support}\nQuestion: {first(row, ('question',), where)}\nAnswer:"
        if "correct_answer" in row:
            wrong = [row[f"distractor{i}"] for i in (1, 2, 3)]
            return Question(prompt, [*wrong, row["correct_answer"]], 3)
        return Question(prompt, first(row, ("choices",), where), first(row, ("answer",), where))
