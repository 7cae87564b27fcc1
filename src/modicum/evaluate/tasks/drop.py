"""drop: questions about a passage that ask to count, add, sort or compare.

    {passage} {question} {answer}

`f1` is the main figure, `em` the exact match, the best over the accepted answers after DROP's normalisation (numbers
compared as numbers, no case, articles or punctuation). Questions about one passage form a cluster. A row: context,
prompt, references.

Dua et al. 2019, arXiv:1903.00161. Wording of lm-evaluation-harness. Departs: an answer of several spans is one text
here, and its words are compared as a bag; the harness aligns the spans one to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.core.files import fingerprint
from modicum.evaluate.multiple_choice import first
from modicum.evaluate.rows import FileConfig
from modicum.evaluate.tasks import Doc
from modicum.evaluate.tasks.generate import squad_normal, word_f1
from modicum.evaluate.written import Written, WrittenTask, number_in

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks drop --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(FileConfig):
    """Where the passages are."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "stories.jsonl"))


class Drop(WrittenTask):
    config: Config
    metric = "f1"
    stop = (".",)

    def question(self, row: dict[str, Any], where: str) -> Written:
        passage, query = first(row, ("context", "passage"), where), first(row, ("prompt", "question"), where)
        answers = first(row, ("references", "answer"), where)
        answers = answers if isinstance(answers, list) else [answers]
        return Written(f"{passage} {query}", answers, cluster=fingerprint(str(passage)))

    def mark(self, reply: str, doc: Doc) -> dict[str, float]:
        given, wanted = _normal(reply), [_normal(a) for a in doc["answers"]]
        return {
            "f1": max(word_f1(given, w) for w in wanted),
            "em": float(given in wanted),
            "unparsed": float(not given),
        }


def _normal(text: str) -> str:
    return " ".join(number_in(word) or squad_normal(word) for word in text.replace("-", " ").split()).strip()
