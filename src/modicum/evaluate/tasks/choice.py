"""choice: multiple choice from a JSONL or Parquet file, by the likelihood of each choice.

The choice with the highest log-likelihood after the question wins. `accuracy` divides the log-likelihood
by the choice's UTF-8 bytes (`normalise=bytes`, so that long choices are not at a disadvantage), by its
tokens, or by nothing; `accuracy_raw` never divides. `nats` is the negative log-likelihood of the right
choice, which moves before accuracy does.

A row: {"question": "...", "choices": ["...", "..."], "answer": 1}. The answer may be an index from 0, a
letter from A, or one of the choices. Gao et al., lm-evaluation-harness (acc and acc_norm).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.rows import FileConfig, fill, pick, rows_of
from modicum.evaluate.tasks import Choose, Doc, Task


@dataclass(frozen=True, kw_only=True)
class Config(FileConfig):
    choices: str = "choices"
    prompt: str = "Question: {question}\nAnswer:"  # {COLUMN} of the file; `context` goes before if not empty
    normalise: str = "bytes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalise not in ("bytes", "tokens", "none"):
            raise ValueError(f"normalise={self.normalise!r}: allowed are bytes, tokens, none")


TOY = Config(file=str(Path(__file__).parent / "examples" / "choice.jsonl"))


class Choice(Task):
    config: Config

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        c = self.config
        for number, row in rows_of(c, split, limit, seed):
            where = f"{c.file}, row {number}"
            choices = pick(row, c.choices, where)
            if not isinstance(choices, list | tuple) or len(choices) < 2:
                raise UserError(f"{where}: {c.choices!r} holds {choices!r}; it must be a list of two or more texts")
            choices = [str(choice) for choice in choices]
            yield {
                "id": str(row.get("id", number)),
                "prompt": fill(c, row, where),
                "choices": choices,
                "answer": _index(pick(row, c.answer, where), choices, where),
            }

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        before = "".join(self.text(shot) + "\n\n" for shot in shots)
        return [Choose(before + doc["prompt"], tuple(" " + choice for choice in doc["choices"]))]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        scores = replies[0]
        raw = np.array([s.nats for s in scores])
        sizes = {"bytes": [s.nbytes for s in scores], "tokens": [s.tokens for s in scores]}
        fair = raw / np.array(sizes.get(self.config.normalise, [1] * len(raw)))
        right = doc["answer"]
        return {
            "accuracy": float(fair.argmax() == right),
            "accuracy_raw": float(raw.argmax() == right),
            "nats": float(-raw[right]),
        }

    def text(self, doc: Doc) -> str:
        return f"{doc['prompt']} {doc['choices'][doc['answer']]}"


def _index(answer: Any, choices: list[str], where: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().isalpha():
        answer = ord(answer.strip().upper()) - ord("A")
    try:
        index = int(answer)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(choices):
        raise UserError(
            f"{where}: the answer {answer!r} is no index from 0 to {len(choices) - 1}, no letter from A "
            "and none of the choices; name the right column with answer=COLUMN"
        )
    return index
