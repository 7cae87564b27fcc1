"""math-word-problems: short arithmetic problems of five collections (SVAMP, AQuA, AddSub, SingleEq, MultiArith).

    Question: {question}
    Answer: {number}

The last number of the reply is compared; `unparsed` counts replies without one. `collection=` asks one of them. A row:
prompt, references, dataset.

Hu et al. 2023, arXiv:2304.01933 (LLM-Adapters), whose test sets these are. Wording is that of `gsm8k`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import first
from modicum.evaluate.rows import FileConfig
from modicum.evaluate.tasks import Doc
from modicum.evaluate.written import Written, WrittenTask, last_number, number_in

NOT_MEASURABLE = "its questions are no part of modicum; ask them by modicum eval --tasks math-word-problems"


@dataclass(frozen=True, kw_only=True)
class Config(FileConfig):
    collection: str = ""  # svamp, aqua, addsub, singleeq or multiarith; left out: all


TOY = Config(file=str(Path(__file__).parent / "examples" / "sums.jsonl"))


class MathWordProblems(WrittenTask):
    config: Config
    stop = ("Question:", "\n\n")
    max_new_tokens = 128

    def question(self, row: dict[str, Any], where: str) -> Written:
        answers = row.get("references") or [str(first(row, ("answer",), where)).rpartition("####")[2].strip()]
        prompt = f"Question: {first(row, ('prompt', 'question'), where)}\nAnswer:"
        return Written(prompt, answers, extra=str(row.get("dataset") or ""))

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        wanted = self.config.collection
        candidates = super().docs(split, None if wanted else limit, seed)
        yield from itertools.islice((d for d in candidates if not wanted or d["extra"] == wanted), limit)

    def extract(self, reply: str) -> str:
        return last_number(reply) or ""

    def mark(self, reply: str, doc: Doc) -> dict[str, float]:
        wanted, given = {number_in(a) or a for a in doc["answers"]}, last_number(reply)
        letter = reply.strip()[:1].upper() if not wanted & {number_in(a) for a in doc["answers"]} else ""
        return {"accuracy": float(given in wanted or letter in wanted), "unparsed": float(given is None and not letter)}
