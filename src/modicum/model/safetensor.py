"""Reading and writing safetensors one tensor at a time, so that weights are in memory once.

The library's reader maps the file, which counts a second time as resident memory while tensors are
converted, and its writer copies the whole file into a buffer; both matter when a model fills half the
machine. The format is a length (8 bytes, little-endian), a JSON header, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from modicum.core.errors import CorruptError, UserError
from modicum.core.files import atomic_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20


class SafetensorsFile:
    """An open file: `names`, `shape(name)`, `dtype(name)`, `read(name)`. Use as a context manager.

    Raises `CorruptError` if the header or the tensors' extents do not fit the file (a cut download).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115  (closed by __exit__)
        try:
            self._entries, self._start = self._header()
        except BaseException:
            self._file.close()
            raise

    def _header(self) -> tuple[dict[str, Any], int]:
        size = self.path.stat().st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CorruptError(f"{self.path} is not a whole safetensors file ({size} bytes); fetch or write it again")
        try:
            entries = json.loads(self._file.read(length))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in DTYPES:
                    raise UserError(f"{self.path}: {name} has dtype {entry['dtype']}; readable: {', '.join(DTYPES)}")
                wanted = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
                if not 0 <= begin <= end <= size - 8 - length or end - begin != wanted:
                    raise CorruptError(
                        f"{self.path}: {name} should occupy {wanted} bytes from {begin}, the "
                        f"file ends at {size - 8 - length}; it was cut or damaged: fetch or "
                        f"write it again"
                    )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(
                f"{self.path} has no valid safetensors header ({error}); fetch or write it again"
            ) from None
        return entries, 8 + length

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entries[name]["dtype"]]

    def read(self, name: str) -> Tensor:
        """A new CPU tensor, filled straight from the file."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        tensor = torch.empty(entry["shape"], dtype=self.dtype(name))
        if end > begin:
            self._file.seek(self._start + begin)
            buffer = tensor.view(-1).view(torch.uint8).numpy().data
            filled = 0
            while filled < len(buffer):
                got = self._file.readinto(buffer[filled:])  # type: ignore[attr-defined]
                if not got:
                    raise CorruptError(f"{self.path}: {name} ends early; fetch or write the file again")
                filled += got
        return tensor

    def mapping(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """`names` as a mapping whose tensors are read when asked for."""
        return _Lazy(self, list(names))


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, file: SafetensorsFile, names: list[str]):
        self._file, self._names = file, names

    def __getitem__(self, name: str) -> Tensor:
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


Item = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]


def write_safetensors(path: str | Path, tensors: Iterable[Item], *, as_given: bool = False) -> None:
    """Write atomically. Each item is (name, shape, dtype, make); `make` is called when its bytes are due.

    as_given: the tensors lie in the file in their order here, for those who read its beginning only.
    """
    items = list(tensors)
    if not as_given:  # wide types first, so that all are aligned
        items.sort(key=lambda item: (-item[2].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype, _ in items:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype, make in items:
            tensor = make().detach().to("cpu", dtype).contiguous()
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: announced {tuple(shape)}, made {tuple(tensor.shape)}")
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
