"""choice: multiple choice from any JSONL or Parquet file, by the likelihood of each choice.

The choice with the highest log-likelihood after the question wins, divided by its UTF-8 bytes (`acc_norm`, the main
figure, so that long choices are not at a disadvantage), by its characters, its tokens or by nothing, all side by side
(`evaluate/multiple_choice.py`); `normalise` says which of them is the main one.

A row: {"question": "...", "choices": ["...", "..."], "answer": 1}. The answer may be an index from 0, a
letter from A, or one of the choices. Gao et al., lm-evaluation-harness (acc and acc_norm).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import MultipleChoice, Question, check_choice
from modicum.evaluate.rows import ColumnConfig, fill, pick

NOT_MEASURABLE = "it has no questions of its own, it asks those of any file"


@dataclass(frozen=True, kw_only=True)
class Config(ColumnConfig):
    choices: str = "choices"
    prompt: str = "Question: {question}\nAnswer:"  # {COLUMN} of the file; `context` goes before if not empty
    normalise: str = "bytes"  # what the main figure divides by: bytes, characters, tokens, none, pmi
    form: str = "cloze"  # cloze, letters or hybrid
    pmi: bool = False  # score the choices without the question too

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.normalise, self.form, self.pmi)


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class Choice(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        c = self.config
        return Question(fill(c, row, where), pick(row, c.choices, where), pick(row, c.answer, where))
