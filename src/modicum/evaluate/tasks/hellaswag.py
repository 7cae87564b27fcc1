"""hellaswag: how a short everyday scene goes on; four endings, three written by a model to deceive models.

    {activity}: {context} {ending}

Each ending is scored after the context (cloze form, `evaluate/multiple_choice.py`); the main figure is acc_norm. The
file has the data set's columns (activity_label, ctx_a, ctx_b, endings, label), cleaned here of WikiHow's marks, or
question, choices, answer; the published figures are of its 10,042 validation rows.

Zellers et al. 2019, arXiv:1905.07830. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first

CLAIM = {
    "figure": "SmolLM2-135M-Instruct 40.9%",
    "where": "its model card (lighteval, zero-shot)",
    "scale": "135M parameters, 10,042 validation rows",
}
NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks hellaswag --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class HellaSwag(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        if "endings" not in row:
            return Question(*(first(row, (name,), where) for name in ("question", "choices", "answer")))
        scene = f"{row.get('ctx_a', '')} {str(row.get('ctx_b') or '').capitalize()}"
        prompt = cleaned(f"{first(row, ('activity_label',), where)}: {scene}")
        return Question(prompt, [cleaned(ending) for ending in row["endings"]], first(row, ("label",), where))


def cleaned(text: str) -> str:
    """As the harness does: an ending that began with a mark keeps the space behind it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
