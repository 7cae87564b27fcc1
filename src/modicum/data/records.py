"""Tables of documents: JSON lines, Parquet, CSV. A record is a document; a bad one becomes a `Drop` by its number."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.data.decoding import open_packed, too_large
from modicum.data.document import Document, Drop

if TYPE_CHECKING:
    from modicum.data.readers import ReadConfig

KEPT = ("title", "language", "format", "date")  # words of a record that stay with its document
_SURROGATE = re.compile("[\ud800-\udfff]")


def record(row: Any, id_: str, source: str, config: ReadConfig) -> Document | Drop:
    """A JSON record or table row: its text field, and id, domain, source or url, title, quality if it has them."""
    content = row.get(config.text_field) if isinstance(row, dict) else None
    if not isinstance(content, str):
        have = ", ".join(map(str, list(row)[:8])) if isinstance(row, dict) else type(row).__name__
        return Drop(id_, "no-text-field", f"no text in {config.text_field!r}; it has: {have}")
    if not content.strip():
        return Drop(id_, "empty")
    if len(content.encode("utf-8", "replace")) > config.max_document_bytes:
        return too_large(id_, config)
    domain = row.get("domain")
    meta = {k: row[k] for k in KEPT if isinstance(row.get(k), str)}
    meta |= {"record_id": str(row["id"])} if isinstance(row.get("id"), str | int) else {}
    score = row.get("quality")
    if isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score):
        meta["quality"] = float(score)
    origin = row.get("url") or row.get("source")
    return Document(
        id_,
        _SURROGATE.sub("\ufffd", content),
        domain if isinstance(domain, str) and domain else "prose",
        origin if isinstance(origin, str) else source,
        json.loads(_SURROGATE.sub("\ufffd", json.dumps(meta, ensure_ascii=False))),
    )


def jsonl(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    limit = config.max_document_bytes * 2 + 4096  # escapes may double a text
    with open_packed(path) as file:
        number = 0
        while line := file.readline(limit):
            number += 1
            name = f"{id_}#{number}"
            if len(line) == limit and not line.endswith(b"\n"):
                while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                    pass
                yield Drop(name, "long-line", f"a line of more than {limit} bytes")
            elif line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Drop(name, "bad-json", str(error).splitlines()[0])
                    continue
                yield record(row, name, id_, config)
        if number == 0:
            yield Drop(id_, "no-records", "the file is empty")


def parquet(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            if config.text_field not in names:
                yield Drop(
                    id_, "no-text-field", f"no column {config.text_field!r}; it has: " + ", ".join(sorted(names)[:8])
                )
                return
            wanted = [n for n in ("id", config.text_field, "domain", "source", "url", *KEPT, "quality") if n in names]
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield record(row, f"{id_}#{number}", id_, config)
        if number == 0:
            yield Drop(id_, "no-records", "the table has no rows")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        yield Drop(id_, "unreadable", f"after {number} rows: {str(error).splitlines()[0]}")


def delimited(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    """CSV, or TSV by its suffix, with a header; fields are as JSON's, a `quality` that is a number becomes one.

    A table without the text field is data, not running text.
    """
    names = [suffix.lower() for suffix in Path(path).suffixes]
    limit, number = config.max_document_bytes, 0
    csv.field_size_limit(max(limit + 1, 131_072))
    with open_packed(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="strict", newline="")
        try:
            reader = csv.DictReader(lines, delimiter="\t" if ".tsv" in names else ",")
            header = list(reader.fieldnames or [])
            if config.text_field not in header:
                have = ", ".join(map(str, header[:8]))
                yield Drop(id_, "data-file", f"a table without a column {config.text_field!r}; it has: {have}")
                return
            for row in reader:
                number += 1
                yield record(_numbers(row), f"{id_}#{number}", id_, config)
            if number == 0:
                yield Drop(id_, "no-records", "the table has no rows")
        except (csv.Error, UnicodeDecodeError) as error:
            yield Drop(f"{id_}#{number + 1}", "bad-record", f"the rest is not read: {error}")


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    try:
        return row | {"quality": float(row["quality"])}
    except (KeyError, TypeError, ValueError):
        return {k: v for k, v in row.items() if k != "quality"}
