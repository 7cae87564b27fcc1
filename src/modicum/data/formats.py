"""File formats: the kind of a file by its name, and the documents in it, in bounded memory."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.core.errors import MissingExtra
from modicum.data import records, web
from modicum.data.decoding import BOMS, PACKED, decode, open_packed, read_whole, too_large
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
DATA = {".xml", ".svg", ".json", ".yaml", ".yml", ".toml", ".lock", ".map", ".ini"}
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
    if suffix in (".csv", ".tsv"):
        return "table"
    if suffix in (".warc", ".wet"):
        return "warc"
    if suffix == ".pdf":
        return "pdf"
    if suffix in HTML:
        return "html"
    if suffix in CODE:
        return "code"
    if suffix in DATA:
        return "data"
    return "markdown" if suffix in MARKDOWN else "text"


def text(
    path: str, id_: str, config: ReadConfig, domain: str = "prose", meta: dict[str, Any] | None = None
) -> Iterator[Document | Drop]:
    """One document, or several of at most max_document_bytes cut at a line (ids end in #part0000)."""
    meta = meta or {}
    with open_packed(path) as file:
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


def markdown(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    yield from text(path, id_, config, meta={"format": "markdown"})


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


def pdf(path: str, id_: str, config: ReadConfig) -> Iterator[Document | Drop]:
    """The text layer of a PDF, pages between empty lines (pypdf). A scan has none."""
    try:
        import pypdf
    except ImportError:
        raise MissingExtra("pypdf", "data", "reading PDF files") from None
    import logging

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    with open(path, "rb") as file:
        try:
            reader = pypdf.PdfReader(file)
            pages = [page.extract_text() or "" for page in reader.pages]
            title = reader.metadata.title if reader.metadata else None
        except Exception as error:  # the library raises what its parser stumbles over
            why = (str(error) or type(error).__name__).splitlines()[0]
            yield Drop(id_, "unreadable", f"not a PDF that can be read: {why}")
            return
    content = "\n\n".join(text.strip() for text in pages if text.strip()).encode("utf-8", "replace").decode()
    if not content:
        yield Drop(id_, "no-text", f"none of its {len(pages)} pages has a text layer")
    elif len(content.encode()) > config.max_document_bytes:
        yield too_large(id_, config)
    else:
        yield Document(id_, content, "prose", id_, {"title": str(title)} if title else {})


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
    "html": web.html,
    "code": code,
    "jsonl": records.jsonl,
    "parquet": records.parquet,
    "table": records.delimited,
    "warc": web.warc,
    "pdf": pdf,
    "data": data,
    "pydoc": pydoc,
}
