"""mmlu: examination questions of 57 subjects, four choices, listed and answered by a letter.

    The following are multiple choice questions (with answers) about {subject}.

    {question}
    A. {choice} ... D. {choice}
    Answer: {letter}

The main figure is acc; items of a subject form a cluster of the standard error. `--shots 5` shows examples of the
split `dev`, drawn over all subjects; the harness shows the first five of the item's own subject, so only the zero-shot
figures are its own. `subject=` asks one subject. The file has question, choices, answer, subject, split; 14,042 test
rows.

Hendrycks et al. 2021, arXiv:2009.03300. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import LetterConfig, MultipleChoice, Question, labelled
from modicum.evaluate.tasks import Doc

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks mmlu --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(LetterConfig):
    """Where the questions are, and how they are scored."""

    subject: str = ""  # ask one subject only, e.g. anatomy


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class Mmlu(MultipleChoice):
    config: Config

    def question(self, row: dict[str, Any], where: str) -> Question:
        question, choices, answer = labelled(row, where)
        subject = str(row.get("subject") or "general knowledge")
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        return Question(f"{about}{question.strip()}\nAnswer:", choices, answer, subject)

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        wanted = self.config.subject
        candidates = super().docs(split, None if wanted else limit, seed)
        yield from itertools.islice((d for d in candidates if not wanted or d["cluster"] == wanted), limit)
