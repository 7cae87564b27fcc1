"""File formats: the kind of a file by its name, and the documents in it, in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import math
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from modicum.data.document import Document, Drop

if TYPE_CHECKING:
    from modicum.data.readers import ReadConfig

CODE = {
    suffix: language
    for language, suffixes in {
        "python": ".py .pyi .pyx",
        "javascript": ".js .mjs .cjs .jsx",
        "typescript": ".ts .tsx",
        "c": ".c .h",
        "c++": ".cc .cpp .cxx .hpp .hh .hxx .cu .cuh",
        "java": ".java",
        "go": ".go",
        "rust": ".rs",
        "ruby": ".rb",
        "php": ".php",
        "c#": ".cs",
        "swift": ".swift",
        "kotlin": ".kt .kts",
        "scala": ".scala",
        "shell": ".sh .bash .zsh",
        "sql": ".sql",
        "r": ".r",
        "julia": ".jl",
        "lua": ".lua",
        "perl": ".pl .pm",
        "haskell": ".hs",
        "ocaml": ".ml .mli",
        "css": ".css .scss",
        "fortran": ".f90 .f",
        "assembly": ".s .asm",
        "elixir": ".ex .exs",
        "dart": ".dart",
        "make": ".mk .cmake",
        "tex": ".tex",
        "zig": ".zig",
        "lisp": ".el .lisp .clj .scm",
    }.items()
    for suffix in suffixes.split()
}
MARKDOWN, HTML = {".md", ".markdown", ".mdx"}, {".html", ".htm", ".xhtml"}
DATA = {".csv", ".tsv", ".xml", ".svg", ".json", ".yaml", ".yml", ".toml", ".lock", ".map", ".ini"}
PACKED = {".gz", ".zst"}
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Control bytes that do not occur in text: all but tab, line ends, form feed, backspace and escape.
_CONTROL = re.compile(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")

Reader = Callable[[str, str, "ReadConfig"], Iterator[Document | Drop]]


def kind_of(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".parquet":
        return "parquet"
    if suffix in HTML:
        return "html"
    if suffix in CODE:
        return "code"
    if suffix in DATA:
        return "data"
    return "markdown" if suffix in MARKDOWN else "text"


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        import zstandard

        file = open(path, "rb")  # noqa: SIM115  (closed with the reader)
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=True)
        return io.BufferedReader(_Errors(reader))
    return open(path, "rb")


class _Errors(io.RawIOBase):
    """zstandard's own error type as the OSError that every other reader raises."""

    def __init__(self, reader: Any):
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return int(self._reader.readinto(buffer))
        except zstandard.ZstdError as error:
            raise OSError(f"not valid zstd ({error})") from None

    def close(self) -> None:
        self._reader.close()
        super().close()


def decode(data: bytes) -> str | None:
    """Text, or None for binary. UTF-8 (or the encoding of a byte-order mark), else Windows-1252."""
    for bom, encoding in BOMS:
        if data.startswith(bom):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError:
                return None
    if b"\0" in data:
        return None
    try:
        text = data.decode("utf-8")
        return None if len(_CONTROL.findall(data)) > len(data) // 100 else text
    except UnicodeDecodeError:
        return None if _CONTROL.search(data) else data.decode("cp1252", "replace")


def text(
    path: str, id_: str, config: ReadConfig, domain: str = "prose", meta: dict[str, Any] | None = None
) -> Iterator[Document | Drop]:
    """One document, or several of at most max_document_bytes cut at a line (ids end in #part0000)."""
    meta = meta or {}
    with _open(path) as file:
        block = file.read(config.max_document_bytes + 1)
        part, is_split = 0, len(block) > config.max_document_bytes
        if is_split and any(block.startswith(bom) for bom, encoding in BOMS if encoding != "utf-8-sig"):
            yield too_large(id_, config)  # cutting at a line end would cut a character of two bytes
            return
        while block:
            more = len(block) > config.max_document_bytes
            cut = _cut(block, config.max_document_bytes) if more else len(block)
            content = decode(block[:cut])
            if content is None:
                yield Drop(id_, "binary", "not text in UTF-8, UTF-16 with a mark, or Windows-1252")
                return
            if not content.strip():
                if not is_split:
                    yield Drop(id_, "empty")
            elif is_split:
                yield Document(f"{id_}#part{part:04d}", content, domain, id_, meta | {"part_of": id_})
            else:
                yield Document(id_, content, domain, id_, meta)
            rest = block[cut:]
            block = rest + file.read(config.max_document_bytes + 1 - len(rest))
            part += 1
        if part == 0:
            yield Drop(id_, "empty")


def _cut(block: bytes, limit: int) -> int:
    """Where to cut: after the last empty line, else line, else word, else character, past half the limit."""
    for separator in (b"\n\n", b"\n", b" "):
        at = block.rfind(separator, limit // 2, limit)
        if at > 0:
            return at + len(separator)
    at = limit
    while at > limit - 4 and block[at] & 0xC0 == 0x80:
        at -= 1
    return at


def read_whole(path: str, config: ReadConfig) -> bytes | None:
    """The file's bytes, or None if there are more than max_document_bytes."""
    with _open(path) as file:
        data = file.read(config.max_document_bytes + 1)
    return None if len(data) > config.max_document_bytes else data


def too_large(id_: str, config: ReadConfig) -> Drop:
    return Drop(id_, "too-large", f"more than {config.max_document_bytes} bytes")


def markdown(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    yield from text(path, id_, config, meta={"format": "markdown"})


def html(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    """The main text as Markdown, without navigation and the like (trafilatura; Barbaresi 2021)."""
    data = read_whole(path, config)
    if data is None:
        yield too_large(id_, config)
        return
    if not data.strip():
        yield Drop(id_, "empty")
        return
    if not data.startswith(tuple(bom for bom, _ in BOMS)) and b"\0" in data:
        yield Drop(id_, "binary", "not HTML")
        return
    import logging

    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    logging.getLogger("htmldate").setLevel(logging.CRITICAL)
    content = trafilatura.extract(
        data,
        output_format="markdown",
        include_formatting=True,
        include_comments=False,
        include_tables=True,
        favor_recall=True,
    )
    if not content or not content.strip():
        yield Drop(id_, "no-text", "no main text found in the page")
        return
    title = re.search(rb"<title[^>]*>(.*?)</title>", data, re.IGNORECASE | re.DOTALL)
    meta = {"format": "markdown"}
    if title:
        import html as entities

        meta["title"] = " ".join(entities.unescape(decode(title[1]) or "").split())
    yield Document(id_, content, "prose", id_, meta)


def code(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    name = path.removesuffix(".gz").removesuffix(".zst")
    language = CODE[Path(name).suffix.lower()]
    if language != "python":
        yield from text(path, id_, config, "code", {"language": language})
        return
    data = read_whole(path, config)
    if data is None:
        yield too_large(id_, config)
        return
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        content = None if b"\0" in data else data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        content = decode(data)
    if content is None:
        yield Drop(id_, "binary", "not text in its declared encoding")
    elif not content.strip():
        yield Drop(id_, "empty")
    else:
        yield Document(id_, content, "code", id_, {"language": "python"})


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
    meta = {k: row[k] for k in ("title", "language", "format") if isinstance(row.get(k), str)}
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
    with _open(path) as file:
        number = 0
        while line := file.readline(limit):
            number += 1
            name = f"{id_}#{number}"
            if len(line) == limit and not line.endswith(b"\n"):
                while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                    pass
                yield too_large(name, config)
            elif line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Drop(name, "bad-json", str(error).splitlines()[0])
                    continue
                yield record(row, name, id_, config)
        if number == 0:
            yield Drop(id_, "empty")


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
            wanted = [
                n
                for n in ("id", config.text_field, "domain", "source", "url", "title", "language", "format")
                if n in names
            ]
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield record(row, f"{id_}#{number}", id_, config)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        yield Drop(id_, "unreadable", f"after {number} rows: {str(error).splitlines()[0]}")


def data(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    yield Drop(id_, "data-file", "tables and settings are not running text; write records as JSONL")


def pydoc(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    """pydoc_data/topics.py: the language reference's topics, one document each."""
    from modicum.data.python_source import topics

    for topic, content in topics(Path(path).read_text(encoding="utf-8")):
        yield Document(f"{id_}#{topic}", content, "prose", id_, {"title": topic, "kind": "reference"})


READERS: dict[str, Reader] = {
    "text": text,
    "markdown": markdown,
    "html": html,
    "code": code,
    "jsonl": jsonl,
    "parquet": parquet,
    "data": data,
    "pydoc": pydoc,
}
