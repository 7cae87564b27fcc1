"""Own kernels for the CPU: C compiled once for this machine, kept in the user's cache, loaded by ctypes.

`library()` gives the loaded kernels or None, `reason()` says why there are none: nothing here raises, since
everything also runs without (`serve.backends`). What is compiled is named by a hash of the sources, the
compiler and the processor's abilities, so a cache shared between machines, or an upgrade, cannot mix them up.

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
    *("half", "eight", "ropes", "cache_kind", "block_size", "n_blocks", "threads"),
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


class Thin(ctypes.Structure):
    _fields_ = [("table", POINTER), ("held", POINTER), ("stride", I64)]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("rows", "ready", "table_stride", "line_stride")),
        *((name, POINTER) for name in ("x", "position", "place", "slot", "root", "line", "table")),
        *((name, POINTER) for name in ("thin", "position_of", "weight_of", "ready_row", "logits")),
    ]


@functools.cache
def abilities() -> frozenset[str]:
    """All the system says of this processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (frozenset(line.split(":")[1].split()) for line in file if line.startswith("flags")), frozenset()
            )
    except OSError:
        return frozenset()


def processor() -> tuple[str, ...]:
    """What this processor can do of what the kernels know to use."""
    return tuple(flag for flag in (*NEEDED, *USEFUL) if flag in abilities())


def multiplies_in_eight_bits() -> bool:
    """Whether there are products of activations in eight bits; they come with those in bfloat16."""
    return {"avx512_vnni", "avx512_bf16"} <= abilities()


def library() -> ctypes.CDLL | None:
    return _load(os.environ.get("MODICUM_NATIVE", "1"))[0]


def reason() -> str:
    """One line: what is in use, or why not."""
    return _load(os.environ.get("MODICUM_NATIVE", "1"))[1]


@functools.cache
def _load(wanted: str) -> tuple[ctypes.CDLL | None, str]:
    if wanted.lower() in ("0", "no", "off", "false"):
        return None, f"off (MODICUM_NATIVE={wanted})"
    lacking = [flag for flag in NEEDED if flag not in processor()]
    if platform.system() != "Linux" or lacking:
        return None, f"none for this processor ({'lacks ' + ', '.join(lacking) if lacking else platform.system()})"
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return None, "no C compiler found; install gcc or clang, or name one in CC"
    try:
        path = build(compiler)
        import torch  # noqa: F401  its OpenMP runtime first: one team of threads for both

        found = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, f"{compiler} could not build them: {said[0] if said else type(error).__name__}"
    found.modicum_open.restype = POINTER
    found.modicum_open.argtypes = (ctypes.POINTER(Model),)
    found.modicum_close.argtypes = (POINTER,)
    found.modicum_step.argtypes = (POINTER, ctypes.POINTER(Step))
    found.modicum_layout.restype = I64
    found.modicum_layout.argtypes = (I64,)
    for i, kind in enumerate((Matrix, Rope, Layer, Model, Step, Thin)):
        if found.modicum_layout(i) != ctypes.sizeof(kind):
            return None, f"the compiled {kind.__name__} has another size than Python's"
    return found, f"AVX-512 ({', '.join(f for f in USEFUL if f in processor()) or 'plain'}), {path}"


def folder() -> Path:
    return cache_home() / "native"


def build(compiler: str) -> Path:
    """The shared library, compiled if this machine has not got it yet. Raises OSError, SubprocessError."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    where = folder()
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write to: a folder of this user's own, for this boot
        where = Path(tempfile.gettempdir()) / f"modicum-{os.getuid()}"
        where.mkdir(mode=0o700, exist_ok=True)
        if where.stat().st_uid != os.getuid():
            raise
    path = where / f"step-{stamp(version)}.so"
    if not path.exists():
        descriptor, fresh = tempfile.mkstemp(suffix=".so", dir=where)
        os.close(descriptor)
        try:
            subprocess.run(
                [compiler, *FLAGS, str(HERE / "step.c"), "-o", fresh, "-lm"],
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            )
            os.replace(fresh, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
    return path


def stamp(version: str) -> str:
    """Names what this compiler makes of the sources here: -march=native may use any of the processor's abilities."""
    digest = hashlib.sha256(repr((version, FLAGS, sorted(abilities()), platform.machine())).encode())
    for source in sorted([*HERE.glob("*.h"), *HERE.glob("*.c")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def use_large_pages(tensors: Iterable[tuple[int, int]]) -> None:
    """Ask the system to put memory (address, bytes) that lies side by side into large pages, in place.

    Weights are read end to end for every token, and looking up 4 KiB pages costs a share of that. A system that will
    not, or cannot (MADV_COLLAPSE is Linux 6.1), changes nothing.
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
    """Memory in large pages, handed out from its beginning on; each page is taken from the system at its first use."""

    def __init__(self, tensors: Iterable[Tensor]):
        """Room for these."""
        self._whole = torch.empty(sum(_aligned(t.nbytes) for t in tensors) + LARGE_PAGE, dtype=torch.uint8)
        self._at = -self._whole.data_ptr() % LARGE_PAGE
        _advise(self._whole.data_ptr() + self._at, self._whole.nbytes - LARGE_PAGE, 14)  # MADV_HUGEPAGE

    def copy(self, tensor: Tensor) -> Tensor:
        new = self._whole[self._at : self._at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        new.copy_(tensor)
        self._at += _aligned(tensor.nbytes)
        return new


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def lay_together(tensors: Sequence[Tensor]) -> None:
    """Move tensors into one piece of memory, one after another, in large pages.

    Codes are made matrix by matrix, and where each of them is smaller than a large page, or not much larger, memory
    taken one by one cannot be put into large pages. The tensors stay the same objects; at no time is more than one of
    them there twice. What lies together already stays: another engine may be reading it.
    """
    tensors = [t for t in tensors if t.untyped_storage().nbytes() == t.nbytes]
    if sum(t.nbytes for t in tensors) < LARGE_PAGE:
        return
    pages = LargePages(tensors)
    for tensor in tensors:
        tensor.data = pages.copy(tensor)
    with contextlib.suppress(OSError, AttributeError):  # the allocator keeps what was freed in pieces
        ctypes.CDLL(None).malloc_trim(0)


def _advise(start: int, size: int, advice: int) -> None:
    """madvise, where there is one; what it says does not matter."""
    try:
        advise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise(start, size, advice)
