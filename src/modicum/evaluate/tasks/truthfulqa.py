"""truthfulqa: questions that many people answer with a misconception; only one choice is true.

    Q: {question}
    A: {choice}

The main figure is acc (MC1). The file has the data set's columns or question, choices, answer; the right choice often
comes first in the file, which the cloze form does not see and `form=letters` would, so that form is refused.

Lin et al. 2022, arXiv:2109.07958. Departs from lm-evaluation-harness: no six solved questions are put before each,
which raise or lower the score of a base model by several points, so figures are comparable with each other only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks truthfulqa --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""

    normalise: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form != "cloze":
            raise ValueError("form=cloze is the only one: the right choice is always first in the published file")


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class TruthfulQA(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        targets = row.get("mc1_targets")
        if targets:
            choices, answer = targets["choices"], list(targets["labels"]).index(1)
        else:
            choices, answer = first(row, ("choices",), where), first(row, ("answer",), where)
        return Question(f"Q: {first(row, ('question',), where)}\nA:", choices, answer)
