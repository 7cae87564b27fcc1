"""winogrande: which of two names fills the blank of a sentence, by how likely its rest becomes.

    {sentence up to the blank}{name} {rest of the sentence}

The rest is scored after each of the two beginnings, so nothing needs normalising; the main figure is acc. The file has
the data set's columns (sentence, option1, option2, answer from 1) or a question with _, choices, answer; the published
figures are of its 1,267 validation rows.

Sakaguchi et al. 2020, arXiv:1907.10641 (partial evaluation: Trinh & Le 2018, arXiv:1806.02847). Wording of
lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError
from modicum.evaluate.multiple_choice import ChoiceConfig, MultipleChoice, Question, first, index_of

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks winogrande --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(ChoiceConfig):
    """Where the questions are, and how they are scored."""

    normalise: str = "none"


TOY = Config(file=str(Path(__file__).parent / "examples" / "blank.jsonl"))


class WinoGrande(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        sentence = str(first(row, ("sentence", "question"), where))
        if "option1" in row:
            names, answer = [row["option1"], row["option2"]], int(row["answer"]) - 1
        else:
            names = first(row, ("choices",), where)
            answer = index_of(first(row, ("answer",), where), [str(n) for n in names], where)
        begins, blank, rest = sentence.partition("_")
        if not blank:
            raise UserError(f"{where}: the sentence has no blank _ to fill: {sentence[:60]!r}")
        before = tuple(f"{begins}{name}" for name in names)
        return Question(sentence, [rest.strip()] * len(names), answer, None, before)
