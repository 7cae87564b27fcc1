"""gsm8k: grade-school word problems in several steps, answered with a number.

    Question: {question}
    Answer: {steps} #### {number}

`accuracy` takes the last number of the reply, `strict` the one after "####"; both are lm-evaluation-harness's filters
(flexible-extract, strict-match). `unparsed` counts replies without a number. Examples (the published figures are with
five, and of 1,319 test rows) come from another split. A row: question and answer of the data set, or prompt,
references and the worked solution.

Cobbe et al. 2021, arXiv:2110.14168. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import first
from modicum.evaluate.rows import FileConfig
from modicum.evaluate.tasks import Doc
from modicum.evaluate.written import Written, WrittenTask, extra_of, last_number, number_in

STRICT = re.compile(r"#### (-?[0-9.,]+)")


NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks gsm8k --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(FileConfig):
    """Where the questions are."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "sums.jsonl"))


class Gsm8k(WrittenTask):
    config: Config
    stop = ("Question:", "</s>", "<|im_end|>")
    max_new_tokens = 256

    def question(self, row: dict[str, Any], where: str) -> Written:
        prompt = f"Question: {first(row, ('question', 'prompt'), where)}\nAnswer:"
        solution = str(row.get("answer") or extra_of(row).get("solution") or "")
        if "references" in row:
            answers = [str(a) for a in row["references"]]
        else:
            answers = [solution.rpartition("####")[2].strip()]
        solved = solution if "####" in solution else f"{solution}\n#### {answers[0]}"
        return Written(prompt, answers, f" {solved.strip()}")

    def extract(self, reply: str) -> str:
        return last_number(reply) or ""

    def mark(self, reply: str, doc: Doc) -> dict[str, float]:
        wanted = {number_in(a) or a for a in doc["answers"]}
        given, strict = last_number(reply), STRICT.search(reply)
        return {
            "accuracy": float(given in wanted),
            "strict": float(strict is not None and number_in(strict[1]) in wanted),
            "unparsed": float(given is None),
        }
