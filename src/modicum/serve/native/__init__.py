"""CPU kernels in C: compiled once per machine (`core.compiled`), loaded by ctypes.

`library()` returns the loaded kernels or None, `reason()` why there are none: nothing here raises, since
everything also runs without them (`serve.backends`). MODICUM_NATIVE=0 turns the kernels off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modicum.core import compiled
from modicum.core.compiled import abilities
from modicum.core.errors import UserError

SOURCE = Path(__file__).parent / "step.c"
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")
USEFUL = ("avx512_bf16", "avx512_vnni")  # with avx512
NEEDED = {  # features by the instruction sets that the kernels are compiled for, the widest first
    "amx": ("amx_tile", "amx_bf16", "amx_int8", *AVX512, *USEFUL),
    "avx512": AVX512,
    "avx2": ("avx2", "fma", "f16c"),
}
EMULATED = "emulated-amx"  # of MODICUM_ISA: tile instructions written out in C, for tests on any of these processors
AVX2_FLAGS = ("-O3", "-mavx2", "-mfma", "-mf16c", *(f for f in compiled.FLAGS if f not in ("-O3", "-march=native")))
FLAGS = {
    "amx": (*compiled.FLAGS, "-DAMX=1"),
    "avx512": compiled.FLAGS,
    "avx2": AVX2_FLAGS,
    EMULATED: (*AVX2_FLAGS, "-DAMX=2"),
}
I64, F32, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
FLOAT32, BFLOAT16, INT8, INT4, FLOAT16, TWO_BITS, THREE_BITS = range(7)
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
    *("half", "int8_activations", "tile_rows", "ropes", "cache_kind", "block_size", "n_blocks", "threads"),
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
    _fields_ = [("table", POINTER), ("count", POINTER), ("stride", I64), ("before", I64)]


class Marks(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("stride", I64)]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("rows", "n_logits", "table_stride", "ancestor_stride")),
        *((name, POINTER) for name in ("x", "position", "entry", "slot", "root", "ancestors", "table")),
        *((name, POINTER) for name in ("evicted", "position_of", "weight_of", "marks", "observed_row", "observed")),
        *((name, I64) for name in ("n_observed", "mark_largest")),
        *((name, POINTER) for name in ("logit_row", "logits")),
    ]


def instruction_set() -> str | None:
    """The widest that this processor has and MODICUM_ISA allows; None if there is none.

    Raises `UserError` for another word in MODICUM_ISA.
    """
    limit = os.environ.get("MODICUM_ISA", "").lower()
    if limit not in ("", "auto", "none", EMULATED, *NEEDED):
        raise UserError(f"MODICUM_ISA={limit} is not known; write {', '.join(NEEDED)}, none or auto")
    if limit == "none":
        return None
    if limit == EMULATED:
        return EMULATED if abilities().issuperset(NEEDED["avx2"]) else None
    names = list(NEEDED)
    allowed = names[names.index(limit) :] if limit in names else names
    able = (name for name in allowed if abilities().issuperset(NEEDED[name]))
    return next((name for name in able if name != "amx" or _tiles_granted()), None)


@functools.cache
def _tiles_granted() -> bool:
    """Whether Linux lets this process use the tile registers (they are off until asked for)."""
    try:
        call = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return False
    return bool(call(158, 0x1023, 18) == 0)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


def processor() -> tuple[str, ...]:
    """The features of this processor that the kernels use."""
    name = instruction_set()
    if name is None:
        return ()
    wanted = (*NEEDED["avx2" if name == EMULATED else name], *(USEFUL if name == "avx512" else ()))
    return tuple(flag for flag in wanted if flag in abilities())


def multiplies_in_eight_bits() -> bool:
    """Whether there are products with int8 activations; they need tiles, or VNNI and bfloat16 products."""
    return instruction_set() in ("amx", EMULATED) or set(USEFUL) <= set(processor())


def library() -> ctypes.CDLL | None:
    return _load(compiled.wanted(), instruction_set())[0]


def reason() -> str:
    """One line: which kernels are in use, or why none."""
    return _load(compiled.wanted(), instruction_set())[1]


@functools.cache
def _load(wanted: str, name: str | None) -> tuple[ctypes.CDLL | None, str]:
    if wanted.lower() in compiled.OFF:
        return None, f"off (MODICUM_NATIVE={wanted})"
    if platform.system() != "Linux":
        return None, f"none for {platform.system()}"
    if name is None:
        lacking = [flag for flag in NEEDED["avx2"] if flag not in abilities()]
        return None, f"none for this processor (lacks {', '.join(lacking)})" if lacking else "off (MODICUM_ISA)"
    compiler = compiled.compiler()
    if compiler is None:
        return None, "no C compiler found; install gcc or clang, or name one in CC"
    try:
        try:
            path = build(compiler, name)
        except subprocess.SubprocessError:
            if name != "amx":
                raise
            name = "avx512"  # a compiler from before tiles
            path = build(compiler, name)
        import torch  # noqa: F401  its OpenMP runtime first: one thread team for both

        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} could not build them: {compiled.failure(error)}"
    loaded.modicum_open.restype = POINTER
    loaded.modicum_open.argtypes = (ctypes.POINTER(Model),)
    loaded.modicum_close.argtypes = (POINTER,)
    loaded.modicum_step.argtypes = (POINTER, ctypes.POINTER(Step))
    loaded.modicum_layout.restype = loaded.modicum_tiles.restype = I64
    loaded.modicum_layout.argtypes = (I64,)
    for i, kind in enumerate((Matrix, Rope, Layer, Model, Step, EvictedPages, Marks)):
        if loaded.modicum_layout(i) != ctypes.sizeof(kind):
            return None, f"the compiled {kind.__name__} has another size than Python's"
    more = ", ".join(f for f in USEFUL if f in processor()) or "plain"
    words = {"amx": "AVX-512 and AMX tiles", "avx512": f"AVX-512 ({more})", EMULATED: "AVX2, emulated tiles"}
    return loaded, f"{words.get(name, 'AVX2')}, {path}"


def build(compiler: str, name: str) -> Path:
    """The path of the shared library for the instruction set `name`, compiled if this machine does not have it.

    Raises OSError, SubprocessError.
    """
    return compiled.build(compiler, SOURCE, abilities(), FLAGS[name])


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
