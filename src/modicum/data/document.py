"""Documents, dropped documents, and their tables."""

from __future__ import annotations

import itertools
import json
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from modicum.core.errors import CorruptError, UserError
from modicum.core.files import atomic_file

if TYPE_CHECKING:
    import pyarrow

ROWS = 256  # documents per Arrow batch when reading
GROUP_BYTES = 8 << 20  # text bytes per Parquet row group when writing, so that readers stay within memory


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its origin.

    id: unique in a corpus. domain: the unit of a mixture's weights ("prose", "code", ...).
    source: where it was read from. meta: JSON-able; `part_of` names the document it was cut from,
    so that the parts of one document stay in one split; `quality` is its score.
    """

    id: str
    text: str
    domain: str = "prose"
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text) if self.text.isascii() else len(self.text.encode("utf-8", "surrogatepass"))

    @property
    def origin(self) -> str:
        """The document this one was cut from, or its own id."""
        return str(self.meta.get("part_of", self.id))

    @property
    def site(self) -> str:
        """Its origin in readable form: a URL's host (en.wikipedia.org), or else its folder.

        The folder is that of the id, which begins with the source's label and contains no path of this machine.
        """
        if "://" in self.source:
            return urllib.parse.urlsplit(self.source).hostname or self.source
        path = PurePosixPath(self.id.split("#")[0])
        return path.as_posix() if len(path.parts) < 2 else path.parent.as_posix()

    @property
    def quality(self) -> float | None:
        """Its quality score (`meta["quality"]`, higher is better), if it has one."""
        score = self.meta.get("quality")
        return float(score) if isinstance(score, int | float) and not isinstance(score, bool) else None


@dataclass(frozen=True, slots=True)
class Drop:
    """A document removed by a step. reason: a short fixed word; detail: the numbers behind it."""

    document_id: str
    reason: str
    detail: str = ""


def to_table(documents: Iterable[Document]) -> pyarrow.Table:
    """Columns id, text, domain, source, meta (JSON text)."""
    import pyarrow as pa

    rows = list(documents)
    return pa.table(
        {
            "id": pa.array([d.id for d in rows], pa.string()),
            "text": pa.array([d.text for d in rows], pa.large_string()),
            "domain": pa.array([d.domain for d in rows], pa.string()),
            "source": pa.array([d.source for d in rows], pa.string()),
            "meta": pa.array([json.dumps(d.meta, sort_keys=True) if d.meta else "" for d in rows], pa.string()),
        }
    )


def from_batch(batch: pyarrow.RecordBatch) -> Iterator[Document]:
    columns = [batch.column(name).to_pylist() for name in ("id", "text", "domain", "source", "meta")]
    for id_, text, domain, source, meta in zip(*columns, strict=True):
        yield Document(id_, text, domain, source, json.loads(meta) if meta else {})


def write_documents(path: str | Path, documents: Iterable[Document]) -> int:
    """Write a Parquet file (zstd) in bounded memory, atomically; returns the number of documents.

    Nothing is written for no documents.
    """
    import pyarrow.parquet as pq

    groups = _groups(documents)
    first = next(groups, None)
    if first is None:
        return 0
    with atomic_file(path) as file, pq.ParquetWriter(file, to_table([]).schema, compression="zstd") as writer:
        count = 0
        for rows in itertools.chain([first], groups):
            writer.write_table(to_table(rows))
            count += len(rows)
    return count


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    rows: list[Document] = []
    size = 0
    for document in documents:
        rows.append(document)
        size += len(document.text)
        if size >= GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def read_parquet(path: str | Path) -> Iterator[Document]:
    """The documents of one file written by `write_documents`, in order, in bounded memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                yield from from_batch(batch)
    except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as error:
        raise CorruptError(
            f"{path} is not a documents file that can be read ({str(error).splitlines()[0]}); curate again"
        ) from None


def document_files(folder: str | Path, split: str = "train") -> list[Path]:
    """The Parquet files of one split of a curated folder, in order."""
    if not (Path(folder) / "documents").is_dir():
        raise UserError(
            f"{folder} is not a curated folder (it has no documents/); type: modicum curate SOURCE --out {folder}"
        )
    return sorted((Path(folder) / "documents").glob(f"{split}-*.parquet"))


def read_documents(folder: str | Path, split: str = "train", domain: str | None = None) -> Iterator[Document]:
    """The documents of one split ("train" or "heldout") of a curated folder, in order.

    Of one domain, document i here is document i of that domain in the token shards.
    """
    for path in document_files(folder, split):
        for document in read_parquet(path):
            if domain is None or document.domain == domain:
                yield document
