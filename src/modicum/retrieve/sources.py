"""Passages from a curated folder, a judged collection, or any source that `data.readers` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError
from modicum.data.document import Document, read_documents
from modicum.data.passages import WORDS, Passage, passages
from modicum.retrieve.known_item import read_collection


def read_passages(
    source: str | Path, skipped: dict[str, int] | None = None, *, words: int = WORDS, overlap: int = 0
) -> Iterator[Passage]:
    """Stream the passages of `source`; reasons of files left out are counted into `skipped`. words, overlap: of
    `data.passages.passages`; a Parquet file's rows stay whole.

    source: a folder made by `modicum curate` (its documents, held-out ones too), a Parquet file with id and text,
    or what `modicum curate` reads (a folder, a file, `python`, `hub:NAME`).
    """
    skipped = skipped if skipped is not None else {}
    path = Path(source)
    if not str(source).strip():
        raise UserError("the source is empty; give a folder, a file, or `python`")
    if (path / "documents").is_dir() and (path / "curation.json").is_file():
        yield from passages((d for split in ("train", "heldout") for d in read_documents(path, split)), words, overlap)
    elif path.suffix == ".parquet" and path.is_file() and _is_collection(path):
        yield from read_collection(path)
    else:
        yield from passages(_read(str(source), skipped), words, overlap)


def _read(source: str, skipped: dict[str, int]) -> Iterator[Document]:
    from modicum.data.readers import ReadConfig, find, read

    config, reasons = ReadConfig(), Counter[str]()
    for unit in find(source, config):
        for item in read(unit, config):
            if isinstance(item, Document):
                yield item
            else:
                reasons[item.reason] += 1
                skipped.update(reasons)


def _is_collection(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names: list[Any] = pq.read_schema(path).names
    except pa.ArrowInvalid:
        return False
    return "id" in names and "text" in names
