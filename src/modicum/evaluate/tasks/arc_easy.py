"""arc-easy: questions of American school science that simple retrieval can answer.

    Question: {question}
    Answer: {choice}

Each choice is scored after the question (cloze form, `evaluate/multiple_choice.py`); the main figure is acc_norm. The
file has the data set's columns (question, choices with text and label, answerKey) or question, choices, answer;
published figures are of its 2,376 test rows.

Clark et al. 2018, arXiv:1803.05457. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, labelled

CLAIM = {
    "figure": "SmolLM2-135M-Instruct 37.3%, the mean of ARC easy and challenge",
    "where": "its model card (lighteval, zero-shot)",
    "scale": "135M parameters, 2,376 test rows",
}
NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks arc-easy --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class ArcEasy(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        prompt, choices, answer = labelled(row, where)
        return Question(f"Question: {prompt}\nAnswer:", choices, answer)
