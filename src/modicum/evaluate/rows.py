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

QUESTIONS = ("test", "validation", "valid", "val", "dev")  # splits to ask, the first that a file has
EXAMPLES = ("train", "dev", "validation", "valid", "val")  # splits to show examples from


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Knobs of a task that reads a file.

    split: the rows to ask, by their value in the column `split_column`; left out: the only one there is, or else
    test, or else validation. Examples (`shots` before each question; left out: as the run says) come from another
    split, train before others and never test, drawn by the run's seed.
    """

    file: str = ""
    split: str | None = None
    split_column: str = "split"
    shots: int | None = None
    shuffle: bool = False  # ask the rows in an order drawn from the seed

    def __post_init__(self) -> None:
        if not self.file:
            raise ValueError("it needs file=PATH, a .jsonl or .parquet file (or --data FOLDER with a file of its name)")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"shots={self.shots} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class ColumnConfig(FileConfig):
    """Knobs of a task for any file; question, answer and context name its columns.

    prompt: a template with {COLUMN} of the file; {question} and {context} stand for the named columns.
    """

    question: str = "question"
    answer: str = "answer"
    context: str = "context"
    prompt: str = "{question}"

    def __post_init__(self) -> None:
        super().__post_init__()
        list(string.Formatter().parse(self.prompt))  # raises ValueError for an unbalanced brace


def rows_of(config: FileConfig, split: str, limit: int | None, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of "test", the rows to ask, or "train", those to show; all rows where no column tells them apart.

    Raises UserError for a split that the file has not, or when none can be chosen.
    """
    rows = list(enumerate(read_rows(config.file)))
    present = dict.fromkeys(str(v) for _, row in rows if (v := row.get(config.split_column)) is not None)
    if present:
        wanted: str | None = _wanted_split(config, list(present))
        if split == "train":
            wanted = next((s for s in EXAMPLES if s in present and s != wanted), None)
        rows = [(n, row) for n, row in rows if row.get(config.split_column) in (None, wanted)] if wanted else []
    elif config.split is not None:
        raise UserError(
            f"{config.file} has no column {config.split_column!r} to choose split={config.split} by; leave split out, "
            "or name the column with split_column=COLUMN"
        )
    if config.shuffle or split == "train":
        random.Random(seed).shuffle(rows)
    yield from rows[:limit]


def _wanted_split(config: FileConfig, present: list[str]) -> str:
    if config.split is not None:
        if config.split not in present:
            raise unknown(f"split of {config.file}", config.split, present, "Choose one with split=NAME")
        return config.split
    if len(present) == 1:
        return present[0]
    for name in QUESTIONS:
        if name in present:
            return name
    raise UserError(f"{config.file} has the splits {', '.join(present)}; choose one with split=NAME")


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


def fill(config: ColumnConfig, row: dict[str, Any], where: str) -> str:
    """The prompt of a row; a context that the template does not place comes first, on lines of its own."""
    named = {"question": config.question, "context": config.context}
    wanted = [name for _, name, _, _ in string.Formatter().parse(config.prompt) if name]
    values = {name: str(pick(row, named.get(name, name), where)) for name in wanted}
    text = config.prompt.format(**values)
    context = row.get(config.context)
    return f"{context}\n\n{text}" if context and "context" not in wanted else text
