"""Passages on disk: one Parquet file, read as a stream or row by row without loading it whole.

A row's number is its id in the BM25 and dense indexes of the same folder.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from modicum.core.errors import CorruptError, UserError
from modicum.core.files import atomic_file
from modicum.data.passages import Passage

ROWS = 512  # passages per row group: what one random access decompresses
COLUMNS = tuple(f.name for f in fields(Passage))
LATER = {"meta"}  # columns that older files lack
T = TypeVar("T")


def indexed_text(passage: Passage, *, without_query_text: bool = False) -> str:
    """The text of a passage that is indexed: its title and text.

    without_query_text: the body in place of the text, which is the text without its first sentence; a passage
    that has no summary sentence stays whole.
    """
    text = passage.body if without_query_text and passage.summary else passage.text
    return f"{passage.title}\n{text}" if passage.title else text


def write_passages(path: str | Path, passages: Iterable[Passage]) -> int:
    """Write a Parquet file atomically; returns the number of rows. A repeated id is a `UserError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    count = 0
    seen: set[int] = set()  # 64-bit hashes: eight bytes an id; collisions do not occur in practice
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for rows in grouped(passages, ROWS):
            for passage in rows:
                if hash(passage.id) in seen:
                    raise UserError(f"passage id {passage.id!r} appears twice; give every passage an id of its own")
                seen.add(hash(passage.id))
            writer.write_table(pa.table({n: [_cell(p, n) for p in rows] for n in COLUMNS}, schema=schema))
            count += len(rows)
    return count


def _cell(passage: Passage, name: str) -> str:
    value = getattr(passage, name)
    return json.dumps(value, sort_keys=True) if name == "meta" and value else value or ""


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items in order; the last may be shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


class Passages(Sequence[Passage]):
    """The rows of one file: iterate in order, or take `passages[row]` (its row group is kept for the next call)."""

    def __init__(self, path: str | Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = Path(path)
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise CorruptError(
                f"{path} cannot be read as passages ({str(error).splitlines()[0]}); build the index again"
            ) from None
        missing = set(COLUMNS) - LATER - set(self._file.schema_arrow.names)
        if missing:
            raise CorruptError(f"{path} lacks the columns {', '.join(sorted(missing))}; build the index again")
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._group = functools.lru_cache(maxsize=8)(self._read_group)

    def _read_group(self, group: int) -> list[Passage]:
        names = [name for name in COLUMNS if name in self._file.schema_arrow.names]
        columns = self._file.read_row_group(group, columns=names).to_pydict()
        if "meta" in columns:
            columns["meta"] = [json.loads(value) if value else {} for value in columns["meta"]]
        return [Passage(**dict(zip(names, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} passages")
        row = row % len(self)
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._group(group)[row - int(self._starts[group])]

    def __iter__(self) -> Iterator[Passage]:
        for group in range(len(self._starts) - 1):
            yield from self._read_group(group)

    def ids(self) -> list[str]:
        """Every id, by row."""
        return self.column("id")

    def column(self, name: str) -> list[Any]:
        """One field of every passage, by row, without reading their texts."""
        if name not in self._file.schema_arrow.names:
            return [{} for _ in range(len(self))]
        values = self._file.read(columns=[name]).column(name).to_pylist()
        return [json.loads(value) if value else {} for value in values] if name == "meta" else values
