"""Reading and writing safetensors one tensor at a time, so that weights are in memory once.

A large tensor is read by mapping it from the file, privately and copy-on-write: nothing is copied, pages come
in as they are used and are shared with every other process that reads the file, and writing to the tensor
gives this process pages of its own and leaves the file alone. A tensor that is freed gives its pages back at
once, so what is converted on loading is not resident twice (the library's reader keeps the whole file). The
library's writer copies the whole file into a buffer. A file that is mapped may be renamed, replaced by a rename
or deleted, as everything here does; a program that shortens it in place ends the processes that read it.

The format is a length (8 bytes, little-endian), a JSON header, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import weakref
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
MAPPED = 64 << 10  # bytes: smaller tensors are copied, since a mapping is made of whole pages


class SafetensorsFile:
    """An open file: `names`, `shape(name)`, `dtype(name)`, `read(name)`. Use as a context manager.

    Raises `CorruptError` if the header or the tensors' extents do not fit the file (a cut download).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115  (closed by __exit__)
        self._map: mmap.mmap | None = None  # of the whole file; lives as long as a tensor in it
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
        self._map = None

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entries[name]["dtype"]]

    def read(self, name: str) -> Tensor:
        """A CPU tensor that may be written to: the file's pages, copied on write, or for a small one new memory."""
        entry = self._entries[name]
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        dtype = self.dtype(name)
        if end - begin >= MAPPED and begin % dtype.itemsize == 0:
            return self._mapped(begin, end).view(dtype).view(entry["shape"])
        tensor = torch.empty(entry["shape"], dtype=dtype)
        if end > begin:
            self._file.seek(begin)
            buffer = tensor.view(-1).view(torch.uint8).numpy().data
            filled = 0
            while filled < len(buffer):
                got = self._file.readinto(buffer[filled:])  # type: ignore[attr-defined]
                if not got:
                    raise CorruptError(f"{self.path}: {name} ends early; fetch or write the file again")
                filled += got
        return tensor

    def _mapped(self, begin: int, end: int) -> Tensor:
        """Bytes begin .. end - 1 of the file, in a storage of their own."""
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        view = memoryview(self._map)[begin:end]  # what the tensor keeps alive, and nothing else does
        tensor = torch.frombuffer(view, dtype=torch.uint8)
        weakref.finalize(view, _give_back, self._map, begin, end, tensor.data_ptr()).atexit = False
        _mapped[tensor.data_ptr()] = end - begin
        return tensor

    def mapping(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """`names` as a mapping whose tensors are read when asked for."""
        return _Lazy(self, list(names))


_mapped: dict[int, int] = {}  # address -> bytes of the tensors whose memory is a file's pages


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is one that `read` mapped, its data untouched or copied on write."""
    return tensor.data_ptr() in _mapped


def mapped_bytes() -> int:
    """Bytes of all tensors that are mapped from files: the system counts their pages as memory it can have back."""
    return sum(_mapped.values())


def _give_back(mapped: mmap.mmap, begin: int, end: int, address: int) -> None:
    """Let go of the pages that only the freed tensor used, while others keep the mapping."""
    _mapped.pop(address, None)
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


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
