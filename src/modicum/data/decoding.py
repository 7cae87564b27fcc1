"""Bytes of files: unpacked while they are read, and decoded to text."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from typing import TYPE_CHECKING, Any, BinaryIO

from modicum.data.document import Drop

if TYPE_CHECKING:
    from modicum.data.readers import ReadConfig

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


def open_packed(path: str) -> BinaryIO:
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


def read_whole(path: str, config: ReadConfig) -> bytes | None:
    """The file's bytes, or None if there are more than max_document_bytes."""
    with open_packed(path) as file:
        data = file.read(config.max_document_bytes + 1)
    return None if len(data) > config.max_document_bytes else data


def too_large(id_: str, config: ReadConfig) -> Drop:
    return Drop(id_, "too-large", f"more than {config.max_document_bytes} bytes")
