"""Tasks answered in words, from files: what they share. A subclass says what a row asks and how a reply is marked."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from modicum.core.errors import UserError
from modicum.evaluate.rows import rows_of
from modicum.evaluate.tasks import Doc, Generate, Task

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


@dataclass(frozen=True)
class Written:
    """answers: accepted ones; solved: what an example shows after the prompt, the first answer if left out."""

    prompt: str
    answers: Sequence[str]
    solved: str = ""
    cluster: str | None = None
    extra: Any = None


class WrittenTask(Task):
    """Base of the tasks on files whose answers are generated.

    description: what stands once before everything; delimiter: between examples. `unparsed` is 1 where a reply holds
    nothing that could be an answer: it is graded wrong, and seen.
    """

    config: Any
    stop: ClassVar[tuple[str, ...]] = ("\n",)
    max_new_tokens: ClassVar[int] = 32
    description: ClassVar[str] = ""
    delimiter: ClassVar[str] = "\n\n"

    @abstractmethod
    def question(self, row: dict[str, Any], where: str) -> Written:
        """What is asked about a row of the file; `where` names the row in errors."""

    @abstractmethod
    def mark(self, reply: str, doc: Doc) -> dict[str, float]:
        """Figures of one reply; `metric` and `unparsed` are among them."""

    def docs(self, split: str, limit: int | None, seed: int) -> Iterator[Doc]:
        for number, row in rows_of(self.config, split, limit, seed):
            where = f"{self.config.file}, row {number}"
            written = self.question(row, where)
            answers = [str(a) for a in written.answers]
            if not answers:
                raise UserError(f"{where}: there is no accepted answer; every row needs one")
            doc = {
                "id": str(row.get("id", number)),
                "prompt": written.prompt,
                "answers": answers,
                "solved": written.solved or f" {answers[0]}",
                "extra": written.extra,
            }
            yield doc | ({} if written.cluster is None else {"cluster": written.cluster})

    def requests(self, doc: Doc, shots: Sequence[Doc]) -> list[Any]:
        before = self.description + "".join(s["prompt"] + s["solved"] + self.delimiter for s in shots)
        return [Generate(before + doc["prompt"], self.max_new_tokens, self.stop)]

    def grade(self, doc: Doc, replies: Sequence[Any]) -> dict[str, float]:
        return self.mark(str(replies[0]), doc)

    def text(self, doc: Doc) -> str:
        return self.description + doc["prompt"] + doc["solved"]


def extra_of(row: dict[str, Any]) -> dict[str, Any]:
    """The column `extra` as a mapping, which files hold as JSON text."""
    extra = row.get("extra")
    parsed = json.loads(extra) if isinstance(extra, str) and extra else extra
    return parsed if isinstance(parsed, dict) else {}


def number_in(text: str) -> str | None:
    """A number as it is compared: without $, thousands' commas, a full stop at its end and useless zeros."""
    plain = text.strip().replace(",", "").replace("$", "").rstrip(".")
    try:
        value = float(plain)
    except ValueError:
        return None
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def last_number(text: str) -> str | None:
    """The last number of a text, as it is compared."""
    matches = NUMBER.findall(text)
    return number_in(matches[-1]) if matches else None
