"""casehold: which of five holdings a court cites, given the text around the citation.

    {text before <HOLDING>} {holding}

Each holding is scored where the blank stands; what follows the blank is left out. The main figure is acc_norm, and
`f1` the macro F1 over the five positions, which the paper reports. A row has the data set's columns (citing_prompt,
holding_0 .. holding_4, label), or question, choices, answer. Wrong holdings are near neighbours of the right one.

Zheng et al. 2021, arXiv:2104.08671 (ICAIL 2021; from memory). Departs: zero-shot by likelihood instead of a trained
classifier; the data set is no part of modicum, `citing` makes such questions of any corpus with references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first
from modicum.evaluate.tasks import Doc

CLAIM = {
    "figure": "macro F1 0.40 of a BiLSTM; +7.2 points by pretraining on law over BERT",
    "where": "abstract",
    "scale": "53,000 questions, trained classifiers",
}
NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks casehold --data FOLDER asks them"
BLANK = "<HOLDING>"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "holdings.jsonl"))


class CaseHold(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        text = str(first(row, ("citing_prompt", "question"), where))
        if BLANK not in text:
            raise UserError(f"{where}: the text has no {BLANK}, so nothing says where the holding stands")
        if "holding_0" in row:
            choices = [row[name] for name in sorted(n for n in row if n.startswith("holding_"))]
        else:
            choices = first(row, ("choices",), where)
        return Question(text.partition(BLANK)[0].rstrip(" ("), choices, first(row, ("label", "answer"), where))

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        sizes = [max(1, len(choice.encode())) for choice in doc["choices"]]
        picked = int(np.argmax(np.array([s.nats for s in replies[0]]) / sizes))
        return super().grade(doc, replies) | {"picked": float(picked), "right": float(doc["answer"])}

    def aggregate(self, rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
        figures = super().aggregate(rows)
        if rows and "picked" in rows[0]:
            pairs = [(int(row["picked"]), int(row["right"])) for row in rows]
            figures["f1"] = {"value": macro_f1(pairs), "stderr": float("nan"), "documents": len(rows)}
            del figures["picked"], figures["right"]
        return figures


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN), from (picked, right) pairs."""
    scores = []
    for k in sorted({c for pair in pairs for c in pair}):
        hits = sum(a == b == k for a, b in pairs)
        scores.append(2 * hits / max(sum(a == k for a, _ in pairs) + sum(b == k for _, b in pairs), 1))
    return float(np.mean(scores))
