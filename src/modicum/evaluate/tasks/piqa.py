"""piqa: how to reach a goal with everyday things; two ways are given, one of them works.

    Question: {goal}
    Answer: {solution}

Each solution is scored after the question (cloze form, `evaluate/multiple_choice.py`); the main figure is acc_norm. The
file has the data set's columns (goal, sol1, sol2, label) or question, choices, answer; the published figures are of
its 1,838 validation rows.

Bisk et al. 2020, arXiv:1911.11641. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first

CLAIM = {
    "figure": "SmolLM2-135M-Instruct 66.3%",
    "where": "its model card (lighteval, zero-shot)",
    "scale": "135M parameters, 1,838 validation rows",
}
NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks piqa --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class Piqa(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        goal = first(row, ("goal", "question"), where)
        choices = [row["sol1"], row["sol2"]] if "sol1" in row else first(row, ("choices",), where)
        return Question(f"Question: {goal}\nAnswer:", choices, first(row, ("label", "answer"), where))
