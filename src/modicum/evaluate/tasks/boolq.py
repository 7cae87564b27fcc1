"""boolq: yes-or-no questions about a passage of an encyclopedia.

    {passage}
    Question: {question}?
    Answer: {no or yes}

The main figure is acc, as two short words need no normalisation. The file has the data set's columns (passage,
question, label or answer) or context, question, choices, answer; the published figures are of its 3,270 validation
rows.

Clark et al. 2019, arXiv:1905.10044. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks boolq --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""

    normalise: str = "none"


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class BoolQ(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        passage = first(row, ("passage", "context"), where) if "passage" in row or row.get("context") else ""
        answer = first(row, ("label", "answer"), where)
        choices = row.get("choices") or ["no", "yes"]
        prompt = f"{passage}\nQuestion: {first(row, ('question',), where)}?\nAnswer:"
        return Question(prompt, choices, int(answer) if isinstance(answer, bool) else answer)
