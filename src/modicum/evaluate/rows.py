"""Rows of a local JSONL or Parquet file, as tasks read them."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.core.errors import CorruptError, UserError, unknown


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Knobs of a task that reads a file; question, answer, context and split name its columns.

    prompt: a template with {COLUMN} of the file; {question} and {context} stand for the named columns.
    A column `split`, where the file has one, separates "train" (examples) from "test".
    """

    file: str = ""
    question: str = "question"
    answer: str = "answer"
    context: str = "context"
    split: str = "split"
    prompt: str = "{question}"
    shuffle: bool = False  # take the rows in an order drawn from the seed

    def __post_init__(self) -> None:
        if not self.file:
            raise ValueError("it needs file=PATH, a .jsonl or .parquet file")
        list(string.Formatter().parse(self.prompt))  # raises ValueError for an unbalanced brace


def rows_of(config: FileConfig, split: str, limit: int | None, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of a split: all rows where the file has no split column."""
    kept = [
        (number, row) for number, row in enumerate(read_rows(config.file)) if row.get(config.split) in (None, split)
    ]
    if not kept and split == "test":
        raise UserError(f"{config.file} has no rows of split {split!r}; name the column with split=COLUMN")
    if config.shuffle:
        random.Random(seed).shuffle(kept)
    yield from kept[:limit]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Raises UserError for a missing file, CorruptError for one that cannot be read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no file {path}; a task's file is a .jsonl or .parquet table")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet as pq

        try:
            return list(pq.read_table(path).to_pylist())
        except pyarrow.ArrowInvalid as error:
            raise CorruptError(f"{path} is not a readable Parquet file: {error}") from None
    if path.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"{path}: {path.suffix or 'no suffix'} is not a task's file; allowed: .jsonl, .parquet")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorruptError(f"{path}, line {number}, is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected an object with the columns of the task")
            rows.append(row)
    return rows


def pick(row: dict[str, Any], column: str, where: str) -> Any:
    if row.get(column) is None:
        raise unknown(f"column in {where}", column, row, "Name the file's columns by knobs, e.g. question=COLUMN")
    return row[column]


def fill(config: FileConfig, row: dict[str, Any], where: str) -> str:
    """The prompt of a row; a context that the template does not place comes first, on lines of its own."""
    named = {"question": config.question, "context": config.context}
    wanted = [name for _, name, _, _ in string.Formatter().parse(config.prompt) if name]
    values = {name: str(pick(row, named.get(name, name), where)) for name in wanted}
    text = config.prompt.format(**values)
    context = row.get(config.context)
    return f"{context}\n\n{text}" if context and "context" not in wanted else text
