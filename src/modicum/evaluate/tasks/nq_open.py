"""nq-open: questions that people typed into a search engine, answered without a text.

    Answer these questions:

    Q: {question}?
    A: {answer}

`accuracy` is an exact match with one of the accepted answers after lm-evaluation-harness's normalisation (no case, no
punctuation, no article at the beginning), `f1` and `contains` as in `generate`. A row: prompt and references.

Kwiatkowski et al. 2019 (TACL 7), Lee et al. 2019, arXiv:1906.00300. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import first
from modicum.evaluate.rows import FileConfig
from modicum.evaluate.tasks import Doc
from modicum.evaluate.tasks.generate import squad_normal, word_f1
from modicum.evaluate.written import Written, WrittenTask

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks nq-open --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(FileConfig):
    """Where the questions are."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "generate.jsonl"))


class NqOpen(WrittenTask):
    config: Config
    stop = ("\n", ".", ",")
    description = "Answer these questions:\n\n"
    delimiter = "\n"

    def question(self, row: dict[str, Any], where: str) -> Written:
        answers = first(row, ("references", "answer"), where)
        answers = answers if isinstance(answers, list) else [answers]
        query = str(first(row, ("prompt", "question"), where)).rstrip("?")
        return Written(f"Q: {query}?\nA:", answers)

    def mark(self, reply: str, doc: Doc) -> dict[str, float]:
        given, wanted = squad_normal(reply), [squad_normal(a) for a in doc["answers"]]
        return {
            "accuracy": float(given in wanted),
            "f1": max(word_f1(given, w) for w in wanted),
            "contains": float(any(f" {w} " in f" {given} " for w in wanted if w)),
            "unparsed": float(not given),
        }
