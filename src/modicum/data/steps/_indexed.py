"""Deduplication against corpora that are curated already: their documents are known, and none of them is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from modicum.data.document import Document

BATCH = 256  # documents whose signatures are made at once
SEPARATOR = "\n"


def folders(against: Sequence[str]) -> list[str]:
    """What `readers.find` reads of each: of a curated folder its documents."""
    return [str(Path(a) / "documents") if (Path(a) / "documents").is_dir() else a for a in against]


def index(against: Sequence[str], signatures: Callable[[Sequence[Document]], np.ndarray]) -> dict[str, np.ndarray]:
    """{"indexed": the signatures of all documents, "indexed_ids": their ids as bytes, one a line}."""
    rows: list[np.ndarray] = []
    ids: list[str] = []
    batch: list[Document] = []

    def sign() -> None:
        rows.append(signatures(batch))
        ids.extend(_id(d) for d in batch)
        batch.clear()

    for document in _read(folders(against)):
        batch.append(document)
        if len(batch) == BATCH:
            sign()
    if batch or not rows:
        sign()
    names = SEPARATOR.join(ids).encode("utf-8", "surrogatepass")
    return {"indexed": np.concatenate(rows), "indexed_ids": np.frombuffer(names, np.uint8)}


def ids_of(names: np.ndarray) -> list[str]:
    text = names.tobytes().decode("utf-8", "surrogatepass")
    return text.split(SEPARATOR) if text else []


def _id(document: Document) -> str:
    return str(document.meta.get("record_id", document.id)).replace(SEPARATOR, " ")


def _read(sources: Sequence[str]) -> Iterator[Document]:
    from modicum.data.readers import ReadConfig, find, read

    config = ReadConfig()
    for source in sources:
        for unit in find(source, config):
            for item in read(unit, config):
                if isinstance(item, Document):
                    yield item
