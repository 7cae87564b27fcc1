"""generate: questions from a JSONL or Parquet file, answered in words and compared exactly.

A row: {"question": "...", "answer": "..."} or a list of accepted answers. `accuracy` is 1 where the
reply equals one of them after normalisation (lower case, no punctuation, no articles, single spaces:
SQuAD's), `f1` the best overlap of words, `contains` whether one of them stands in the reply.

Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError
from modicum.evaluate.rows import ColumnConfig, fill, pick, rows_of
from modicum.evaluate.tasks import Doc, Generate, Task

NOT_MEASURABLE = "it has no questions of its own, it asks those of any file"


@dataclass(frozen=True, kw_only=True)
class Config(ColumnConfig):
    prompt: str = "Question: {question}\nAnswer:"
    max_new_tokens: int = 32
    stop: str = "\n"  # several are separated by |


TOY = Config(file=str(Path(__file__).parent / "examples" / "generate.jsonl"))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class GenerateTask(Task):
    config: Config

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        c = self.config
        for number, row in rows_of(c, split, limit, seed):
            where = f"{c.file}, row {number}"
            answers = pick(row, c.answer, where)
            answers = [str(a) for a in answers] if isinstance(answers, list | tuple) else [str(answers)]
            if not answers:
                raise UserError(f"{where}: {c.answer!r} is empty; every row needs an accepted answer")
            yield {"id": str(row.get("id", number)), "prompt": fill(c, row, where), "answers": answers}

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        before = "".join(self.text(shot) + "\n\n" for shot in shots)
        stops = tuple(s for s in self.config.stop.split("|") if s)
        return [Generate(before + doc["prompt"], self.config.max_new_tokens, stops)]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        given = squad_normal(replies[0])
        wanted = [squad_normal(answer) for answer in doc["answers"]]
        return {
            "accuracy": float(given in wanted),
            "f1": max(word_f1(given, w) for w in wanted),
            "contains": float(any(f" {w} " in f" {given} " for w in wanted if w)),
        }

    def text(self, doc: Doc) -> str:
        return f"{doc['prompt']} {doc['answers'][0]}"


def squad_normal(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words, counted with multiplicity."""
    a, b = given.split(), wanted.split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))
