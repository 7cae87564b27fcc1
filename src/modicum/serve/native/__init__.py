"""CPU kernels in C: compiled once per machine, stored in the user's cache, loaded by ctypes.

`library()` returns the loaded kernels or None, `reason()` why there are none: nothing here raises, since
everything also runs without them (`serve.backends`). The compiled file is named by a hash of the sources, the
compiler and the processor's features, so that a cache used by several machines, or an upgrade, stays consistent.

Environment: MODICUM_NATIVE=0 turns the kernels off; CC names the compiler; MODICUM_HOME or XDG_CACHE_HOME
moves the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modicum.core.files import cache_home

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")
USEFUL = ("avx512_bf16", "avx512_vnni")
I64, F32, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
FLOAT32, BFLOAT16, INT8, INT4, FLOAT16 = range(5)
LARGE_PAGE = 2**21  # bytes


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("kind", "out_", "in_", "group", "groups", "scale_kind", "center")),
        *((name, POINTER) for name in ("weight", "scale", "zero", "bias")),
    ]


class Rope(ctypes.Structure):
    _fields_ = [("angles", POINTER), ("rotated", I64), ("scale", F32), ("unused", F32)]


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm", "q_norm", "k_norm")


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        *((name, POINTER) for name in NORMS),
        ("rope", I64),
        ("window", I64),
        ("scale", F32),
        ("unused", F32),
    ]


COUNTS = (
    *("layers", "width", "heads", "kv_heads", "head_dim", "mlp_width", "rotated", "activation", "qk_norm_full"),
    *("half", "int8_activations", "ropes", "cache_kind", "block_size", "n_blocks", "threads"),
)


class Model(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in COUNTS),
        ("eps", F32),
        ("softcap", F32),
        ("layer", ctypes.POINTER(Layer)),
        ("rope", ctypes.POINTER(Rope)),
        ("final_norm", POINTER),
        ("head", Matrix),
        ("k_cache", POINTER),
        ("v_cache", POINTER),
        ("k_scale", POINTER),
        ("v_scale", POINTER),
    ]


class EvictedPages(ctypes.Structure):
    _fields_ = [("table", POINTER), ("count", POINTER), ("stride", I64)]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("rows", "n_logits", "table_stride", "ancestor_stride")),
        *((name, POINTER) for name in ("x", "position", "entry", "slot", "root", "ancestors", "table")),
        *((name, POINTER) for name in ("evicted", "position_of", "weight_of", "logit_row", "logits")),
    ]


@functools.cache
def abilities() -> frozenset[str]:
    """Feature flags of this processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (frozenset(line.split(":")[1].split()) for line in file if line.startswith("flags")), frozenset()
            )
    except OSError:
        return frozenset()


def processor() -> tuple[str, ...]:
    """The features of this processor that the kernels use."""
    return tuple(flag for flag in (*NEEDED, *USEFUL) if flag in abilities())


def multiplies_in_eight_bits() -> bool:
    """Whether there are products with int8 activations; they need VNNI and bfloat16 products."""
    return {"avx512_vnni", "avx512_bf16"} <= abilities()


def library() -> ctypes.CDLL | None:
    return _load(os.environ.get("MODICUM_NATIVE", "1"))[0]


def reason() -> str:
    """One line: which kernels are in use, or why none."""
    return _load(os.environ.get("MODICUM_NATIVE", "1"))[1]


@functools.cache
def _load(wanted: str) -> tuple[ctypes.CDLL | None, str]:
    if wanted.lower() in ("0", "no", "off", "false"):
        return None, f"off (MODICUM_NATIVE={wanted})"
    missing = [flag for flag in NEEDED if flag not in processor()]
    if platform.system() != "Linux" or missing:
        return None, f"none for this processor ({'lacks ' + ', '.join(missing) if missing else platform.system()})"
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return None, "no C compiler found; install gcc or clang, or name one in CC"
    try:
        path = build(compiler)
        import torch  # noqa: F401  its OpenMP runtime first: one thread team for both

        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, f"{compiler} could not build them: {output[0] if output else type(error).__name__}"
    loaded.modicum_open.restype = POINTER
    loaded.modicum_open.argtypes = (ctypes.POINTER(Model),)
    loaded.modicum_close.argtypes = (POINTER,)
    loaded.modicum_step.argtypes = (POINTER, ctypes.POINTER(Step))
    loaded.modicum_layout.restype = I64
    loaded.modicum_layout.argtypes = (I64,)
    for i, kind in enumerate((Matrix, Rope, Layer, Model, Step, EvictedPages)):
        if loaded.modicum_layout(i) != ctypes.sizeof(kind):
            return None, f"the compiled {kind.__name__} has another size than Python's"
    return loaded, f"AVX-512 ({', '.join(f for f in USEFUL if f in processor()) or 'plain'}), {path}"


def folder() -> Path:
    return cache_home() / "native"


def build(compiler: str) -> Path:
    """The path of the shared library, compiled if this machine does not have it. Raises OSError, SubprocessError."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    directory = folder()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # no writable home: a private temporary folder
        directory = Path(tempfile.gettempdir()) / f"modicum-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise
    path = directory / f"step-{stamp(version)}.so"
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=directory)
        os.close(descriptor)
        try:
            subprocess.run(
                [compiler, *FLAGS, str(HERE / "step.c"), "-o", temporary, "-lm"],
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            )
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return path


def stamp(version: str) -> str:
    """Names the compiled sources: -march=native may use any of the processor's features."""
    digest = hashlib.sha256(repr((version, FLAGS, sorted(abilities()), platform.machine())).encode())
    for source in sorted([*HERE.glob("*.h"), *HERE.glob("*.c")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def use_large_pages(tensors: Iterable[tuple[int, int]]) -> None:
    """Ask the system to move adjacent memory (address, bytes) to large pages, in place.

    Weights are read completely for every token, and TLB misses of 4 KiB pages cost part of that time. A system that
    refuses, or cannot (MADV_COLLAPSE needs Linux 6.1), changes nothing.
    """
    page = LARGE_PAGE
    spans: list[list[int]] = []
    for start, size in sorted(tensors):
        if spans and start - spans[-1][1] < 2**16:
            spans[-1][1] = max(spans[-1][1], start + size)
        else:
            spans.append([start, start + size])
    for start, end in spans:
        first, last = -(-start // page) * page, end // page * page
        if last > first:
            _advise(first, last - first, 25)  # MADV_COLLAPSE


class LargePages:
    """An arena in large pages; each page is allocated by the system at its first use."""

    def __init__(self, tensors: Iterable[Tensor]):
        """With capacity for these."""
        self._arena = torch.empty(sum(_aligned(t.nbytes) for t in tensors) + LARGE_PAGE, dtype=torch.uint8)
        self._at = -self._arena.data_ptr() % LARGE_PAGE
        _advise(self._arena.data_ptr() + self._at, self._arena.nbytes - LARGE_PAGE, 14)  # MADV_HUGEPAGE

    def copy(self, tensor: Tensor) -> Tensor:
        new = self._arena[self._at : self._at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        new.copy_(tensor)
        self._at += _aligned(tensor.nbytes)
        return new


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def coalesce(tensors: Sequence[Tensor]) -> None:
    """Move tensors into one allocation, one after another, in large pages.

    Codes are allocated matrix by matrix, and where each of them is smaller than a large page, or not much larger,
    separate allocations cannot be put into large pages. The tensors stay the same objects; at most one of them exists
    twice at any time. Tensors that are together already stay: another engine may be reading them.
    """
    tensors = [t for t in tensors if t.untyped_storage().nbytes() == t.nbytes]
    if sum(t.nbytes for t in tensors) < LARGE_PAGE:
        return
    pages = LargePages(tensors)
    for tensor in tensors:
        tensor.data = pages.copy(tensor)
    with contextlib.suppress(OSError, AttributeError):  # the allocator keeps fragmented free memory
        ctypes.CDLL(None).malloc_trim(0)


def _advise(start: int, size: int, advice: int) -> None:
    """madvise, where it exists; its result is ignored."""
    try:
        advise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise(start, size, advice)
