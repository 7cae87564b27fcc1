"""GGUF files: metadata, tensors and their bytes, mapped instead of read.

A file is a header, keys with typed values, a list of tensors (name, shape, type, offset) and their bytes
(specification: `docs/gguf.md` in ggml). Opening one costs a walk over the keys: texts of arrays are decoded when
they are asked for, and tensors are views of the mapped file. `tokenizer.py` makes a `tokenizer.json` of the
metadata; what the metadata says about a model is read in `model/gguf`. Nothing here imports torch.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.errors import CorruptError, UserError, unknown

NAME = "model.gguf"  # in a model's folder, instead of safetensors
_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """`shape` is (rows, ..., columns) as numpy counts; `blocks`: bytes (uint8) of each row, (rows, ..., bytes)."""

    name: str
    type: str  # "Q4_1", "F32", ...
    shape: tuple[int, ...]
    blocks: np.ndarray


def file_in(path: str | Path) -> Path | None:
    """The GGUF file that `path` is, or that the folder `path` holds instead of safetensors; None if there is none."""
    path = Path(path)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if (path / NAME).is_file() and not any(path.glob("*.safetensors")):
        return path / NAME
    return None


class GgufFile:
    """An open file: `metadata` (key to value) and `tensors` (name to `GgufTensor`, views of the mapped file).

    The map is private: writing to a view changes this process's memory, never the file. Raises `UserError` for
    what is no GGUF file or of a kind that is not read, `CorruptError` for one that was cut or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); give a GGUF file") from None
        if self._map[:4] != _MAGIC:
            raise UserError(f"{self.path} is no GGUF file: it does not begin with GGUF; give one written by llama.cpp")
        try:
            self._read(_Cursor(self._map, len(_MAGIC)))
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            raise CorruptError(f"{self.path} is cut or damaged ({error}); fetch or write it again") from None

    # --- the header -------------------------------------------------------------------------------

    def _read(self, cursor: _Cursor) -> None:
        version = cursor.scalar("I")
        if version not in (2, 3):
            other = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
            raise UserError(f"{self.path} is {other}; GGUF versions 2 and 3, little-endian, are read: convert it again")
        n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
        where: dict[str, tuple[int, int]] = {}
        for _ in range(n_keys):
            key, kind = cursor.text(), cursor.scalar("I")
            where[key] = (kind, cursor.at)
            cursor.skip(kind)
        self.metadata: Mapping[str, Any] = _Metadata(self._map, where)
        if self.metadata.get("split.count", 1) > 1:
            raise UserError(
                f"{self.path} is one of {self.metadata['split.count']} parts of a model; join them first: "
                "llama-gguf-split --merge FIRST_PART OUT.gguf"
            )
        listed = []
        for _ in range(n_tensors):
            name = cursor.text()
            shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))
            listed.append((name, shape[::-1], cursor.scalar("I"), cursor.scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CorruptError(f"{self.path} has general.alignment {alignment!r}, not a number of bytes")
        start = -(-cursor.at // alignment) * alignment
        self.tensors = {name: self._tensor(name, shape, kind, start + at) for name, shape, kind, at in listed}
        if len(self.tensors) != n_tensors:
            raise CorruptError(f"{self.path} names a tensor twice; write it again")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, at: int) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError:
            raise UserError(f"{self.path}: {name} has tensor type {kind}, which the gguf package does not know; "
                            "update it: pip install -U gguf") from None  # fmt: skip
        block, size = GGML_QUANT_SIZES[type_]
        if not shape or shape[-1] % block:
            raise CorruptError(f"{self.path}: rows of {name} {shape} are not whole blocks of {block} ({type_.name})")
        stored = (*shape[:-1], shape[-1] // block * size)
        count = 1
        for n in stored:
            count *= n
        if at + count > len(self._map):
            raise CorruptError(
                f"{self.path}: {name} should end at byte {at + count}, the file ends at {len(self._map)}; it was cut: "
                "fetch it again"
            )
        return GgufTensor(name, type_.name, shape, np.frombuffer(self._map, np.uint8, count, at).reshape(stored))

    # --- what the keys say ------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        return str(self.require("general.architecture"))

    def require(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self.metadata:
            raise UserError(f"{self.path} lacks the key {key!r}, which a model needs; convert it again")
        return self.metadata[key]


class _Cursor:
    """A read offset in the mapped file. No reference to a `GgufFile`: the map is released with its last tensor."""

    def __init__(self, data: Any, at: int = 0):
        self.data, self.at = data, at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        return self._bytes().decode("utf-8")

    def _bytes(self) -> bytes:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            raise IndexError(f"a text of {length} bytes at {self.at}")
        self.at += length
        return self.data[self.at - length : self.at]

    def skip(self, kind: int) -> None:
        """Move behind a value."""
        if kind in _SCALARS:
            self.at += struct.calcsize("<" + _SCALARS[kind])
        elif kind == _STRING:
            self._bytes()
        elif kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if count > len(self.data) - self.at:
                raise IndexError(f"an array of {count} values at {self.at}")
            if inner in _SCALARS:
                self.at += count * struct.calcsize("<" + _SCALARS[inner])
            elif inner == _STRING:
                at, data, length = self.at, self.data, struct.Struct("<Q").unpack_from
                for _ in range(count):
                    at += 8 + length(data, at)[0]
                self.at = at
            else:
                for _ in range(count):
                    self.skip(inner)
        else:
            raise IndexError(f"a value of type {kind} at {self.at}")
        if self.at > len(self.data):
            raise IndexError(f"a value that ends at {self.at} in a file of {len(self.data)} bytes")

    def value(self, kind: int) -> Any:
        """The value that begins here; moves behind it."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            self.at += struct.calcsize(form)
            return list(struct.unpack_from(form, self.data, self.at - struct.calcsize(form)))
        if inner != _STRING:
            return [self.value(inner) for _ in range(count)]
        texts = []  # hundreds of thousands in a vocabulary
        at, data, length = self.at, self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8 + length(data, at)[0]
            texts.append(data[at + 8 : end].decode("utf-8", "replace"))
            at = end
        self.at = at
        return texts


class _Metadata(Mapping[str, Any]):
    """Values are decoded when asked for, and kept."""

    def __init__(self, data: Any, where: dict[str, tuple[int, int]]):
        self._data, self._where = data, where
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, at = self._where[key]
            self._values[key] = _Cursor(self._data, at).value(kind)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def dequantize(tensor: GgufTensor) -> np.ndarray:
    """The tensor's values in float32, by the gguf package's reference. Raises `UserError` for types it lacks."""
    import gguf

    try:
        values = gguf.dequantize(tensor.blocks, gguf.GGMLQuantizationType[tensor.type])
    except NotImplementedError:
        known = [t.name for t in gguf.GGMLQuantizationType if t.name in ("F32", "F16") or t in gguf.quants._type_traits]
        raise unknown("GGUF tensor type", tensor.type, known) from None
    return np.asarray(values, dtype=np.float32)
