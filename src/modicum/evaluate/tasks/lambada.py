"""lambada: the last word of a passage of a novel, which only the whole passage tells.

    {passage without its last word} {last word}

The word is right (`acc`) if greedy decoding gives exactly its tokens; `nats` is its negative log-likelihood,
`perplexity` the exponential of its mean. A row: text of the data set, or prompt and references; the published figures
are of 5,153 test rows.

Paperno et al. 2016, arXiv:1606.06031. Wording of lm-evaluation-harness (lambada_openai).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate.multiple_choice import first
from modicum.evaluate.rows import FileConfig, rows_of
from modicum.evaluate.tasks import Choose, Doc, Task

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks lambada --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(FileConfig):
    """Where the passages are."""


TOY = Config(file=str(Path(__file__).parent / "examples" / "passages.jsonl"))


class Lambada(Task):
    config: Config
    metric = "acc"

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        for number, row in rows_of(self.config, split, limit, seed):
            where = f"{self.config.file}, row {number}"
            if "references" in row:
                passage, word = str(first(row, ("prompt",), where)), str(row["references"][0])
            else:
                passage, _, word = str(first(row, ("text",), where)).rpartition(" ")
            yield {"id": str(row.get("id", number)), "prompt": passage.rstrip(), "word": word.strip()}

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        before = "".join(self.text(shot) + "\n\n" for shot in shots)
        return [Choose(before + doc["prompt"], (f" {doc['word']}",))]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        (score,) = replies[0]
        return {"acc": float(score.greedy), "nats": -score.nats}

    def aggregate(self, rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
        summary = super().aggregate(rows)
        nats = summary["nats"]
        value = math.exp(min(nats["value"], 700.0))
        spread = {"value": value, "stderr": value * nats["stderr"], "documents": nats["documents"]}
        return summary | {"perplexity": spread}

    def text(self, doc: Doc) -> str:
        return f"{doc['prompt']} {doc['word']}"
