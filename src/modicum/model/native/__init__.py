"""Kernels of a training step for the CPU: norm, gated activation, rotation, attention, cross-entropy, each in one pass.

Written in C for vectors of any width, compiled once per machine (`core.compiled`). `library()` gives them or None,
`reason()` says which or why none; MODICUM_NATIVE=0 turns them off. The functions below take tensors (bfloat16 or
float32, of one dtype) and know nothing of gradients: `model.fused` makes autograd functions of them. Results do not
depend on the number of threads. Matrix products are in `products`.

Shapes: N rows, D width, F MLP width, V vocabulary, B batch, T tokens, H query heads, G key/value heads (G divides H),
E head_dim, R rotated dimensions.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from modicum.core import compiled

SOURCE = Path(__file__).parent / "kernels.c"
I64, F32, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
KINDS = {torch.float32: 0, torch.bfloat16: 1}
MULTIPLE = 16  # of which rows and heads are, so that every processor's vectors divide them


class Strides(ctypes.Structure):
    _fields_ = [("b", I64), ("h", I64), ("t", I64)]


class Attention(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("kind", "B", "H", "G", "T", "E", "threads")),
        ("scale", F32),
        ("unused", F32),
        *((name, POINTER) for name in ("q", "k", "v", "out")),
        *((name, Strides) for name in ("sq", "sk", "sv", "so")),
        ("first", POINTER),
        ("first_b", I64),
        ("lse", POINTER),
        ("grad", POINTER),
        ("sg", Strides),
        *((name, POINTER) for name in ("dq", "dk", "dv")),
        *((name, Strides) for name in ("sdq", "sdk", "sdv")),
    ]


def library() -> ctypes.CDLL | None:
    return _load(compiled.wanted())[0]


def reason() -> str:
    """One line: which kernels are in use, or why none."""
    return _load(compiled.wanted())[1]


@functools.cache
def _load(wanted: str) -> tuple[ctypes.CDLL | None, str]:
    if wanted.lower() in compiled.OFF:
        return None, f"off (MODICUM_NATIVE={wanted})"
    if platform.system() != "Linux":
        return None, f"none for {platform.system()}"
    compiler = compiled.compiler()
    if compiler is None:
        return None, "no C compiler found; install gcc or clang, or name one in CC"
    try:
        return load(compiled.build(compiler, SOURCE, compiled.abilities()))
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} could not build them: {compiled.failure(error)}"


def load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The kernels compiled as `path`, and a line about them. Raises OSError."""
    loaded = ctypes.CDLL(str(path))  # after torch, whose OpenMP runtime it shares
    p, i, f = POINTER, I64, F32
    signatures = {
        "norm": (i, p, p, p, p, p, i, i, f, i),
        "norm_backward": (i, p, p, p, p, p, p, i, i, f, i),
        "swiglu": (i, p, p, i, p, i, i, i),
        "swiglu_backward": (i, p, p, i, p, p, p, i, p, i, i, i),
        "rotate": (i, p, p, p, p, p, p, i, i, i, i, i, i, f, i),
        "cross_entropy": (i, p, p, p, p, i, i, i),
        "accumulate": (p, p, i, i),
        "product": (i, p, i, p, i, p, i, i, i, i),
        "attention": (p, i),
    }
    for name, arguments in signatures.items():
        getattr(loaded, f"modicum_{name}").argtypes = arguments
    for name in ("vector", "pairs", "chunk", "attention_size", "attention", "cross_entropy", "product"):
        getattr(loaded, f"modicum_{name}").restype = I64
    if loaded.modicum_attention_size() != ctypes.sizeof(Attention):
        return None, "the compiled Attention has another size than Python's"
    words = "products of bfloat16 pairs" if loaded.modicum_pairs() else "products in float32"
    return loaded, f"vectors of {loaded.modicum_vector()} floats, {words}, {path}"


def _call(name: str, *arguments: object) -> int:
    kernels = library()
    assert kernels is not None
    given = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    return int(getattr(kernels, f"modicum_{name}")(*given) or 0)


def _rows(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def norm(x: Tensor, weight_D: Tensor, eps: float, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * weight, x), or of x + add, which is then the second. Weight in float32."""
    x, add = _rows(x), None if add is None else _rows(add)
    out, D = torch.empty_like(x), x.shape[-1]
    total = x if add is None else torch.empty_like(x)
    _call("norm", KINDS[x.dtype], x, add, weight_D, total, out, x.numel() // D, D, eps, torch.get_num_threads())
    return out, total


def norm_backward(
    x: Tensor,
    weight_D: Tensor,
    grad: Tensor,
    eps: float,
    *,
    add: Tensor | None = None,
    dx: bool = True,
    dw: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in x (plus `add`, the gradient of what passes beside the norm) and in the weight (float32)."""
    x, grad, add = _rows(x), _rows(grad), None if add is None else _rows(add)
    kernels, D = library(), x.shape[-1]
    assert kernels is not None
    N = x.numel() // D
    out = torch.empty_like(x) if dx else None
    chunks = -(-N // kernels.modicum_chunk())
    sums = torch.empty(chunks, D, dtype=torch.float32) if dw else None
    _call("norm_backward", KINDS[x.dtype], x, weight_D, grad, add, out, sums, N, D, eps, torch.get_num_threads())
    return out, None if sums is None else sums.sum(0)


def _matrix(x: Tensor) -> tuple[Tensor, int]:
    """Rows with a stride: a tensor whose leading dimensions are one, and the distance of its rows."""
    size = x.shape[-1]
    if x.is_contiguous():
        return x, size
    flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return (flat, flat.stride(0)) if flat.stride(-1) == 1 else (flat.contiguous(), size)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    (gate_NF, ld), (up_NF, other), F = _matrix(gate), _matrix(up), gate.shape[-1]
    if ld != other:
        gate_NF, up_NF, ld = gate.contiguous(), up.contiguous(), F
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _call("swiglu", KINDS[gate.dtype], gate_NF, up_NF, ld, out, out.numel() // F, F, torch.get_num_threads())
    return out


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor, *, product: bool = False) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up side by side (..., 2 F); silu(gate) * up again, if wanted."""
    (gate_NF, ld), (up_NF, other), grad, F = _matrix(gate), _matrix(up), _rows(grad), gate.shape[-1]
    if ld != other:
        gate_NF, up_NF, ld = gate.contiguous(), up.contiguous(), F
    both = torch.empty(*gate.shape[:-1], 2 * F, dtype=gate.dtype)
    out = torch.empty(gate.shape, dtype=gate.dtype) if product else None
    _call(
        *("swiglu_backward", KINDS[gate.dtype], gate_NF, up_NF, ld, grad, both, both[..., F:], 2 * F, out),
        *(grad.numel() // F, F, torch.get_num_threads()),
    )
    return both, out


def _heads(x_BHTE: Tensor) -> Tensor:
    return x_BHTE if x_BHTE.stride(-1) == 1 else x_BHTE.contiguous()


def _strides(x_BHTE: Tensor) -> Strides:
    return Strides(x_BHTE.stride(0), x_BHTE.stride(1), x_BHTE.stride(2))


def heads_like(x_BHTE: Tensor) -> Tensor:
    """Memory of that shape, laid out as projections read it: the heads of a token side by side."""
    B, H, T, E = x_BHTE.shape
    return torch.empty(B, T, H, E, dtype=x_BHTE.dtype).transpose(1, 2)


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0, out: Tensor | None = None) -> Tensor:
    """As `model.rope.rotate`, into `out` (which may be x itself); sign -1 turns back. cos, sin: (B or 1, 1, T, R/2)."""
    x_BHTE, cos, sin = _heads(x_BHTE), _rows(cos), _rows(sin)
    out = heads_like(x_BHTE) if out is None else out
    B, H, T, E = x_BHTE.shape
    per_row = cos.stride(0) if cos.shape[0] > 1 else 0
    _call(
        *("rotate", KINDS[x_BHTE.dtype], x_BHTE, ctypes.byref(_strides(x_BHTE)), out, ctypes.byref(_strides(out))),
        *(cos, sin, per_row, B, H, T, E, 2 * cos.shape[-1], sign, torch.get_num_threads()),
    )
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, first: Tensor, lse: Tensor, scale: float) -> Attention:
    B, H, T, E = q.shape
    return Attention(
        kind=KINDS[q.dtype], B=B, H=H, G=k.shape[1], T=T, E=E, threads=torch.get_num_threads(), scale=scale,
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(),
        sq=_strides(q), sk=_strides(k), sv=_strides(v), so=_strides(out),
        first=first.data_ptr(), first_b=first.stride(0) if first.shape[0] > 1 else 0,
    )  # fmt: skip


def attention(
    q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, first_BT: Tensor, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out_BHTE, lse_BHT): query i sees the keys first[i] ... i. first: int32, (B or 1, T), between 0 and i."""
    q, k, v = _heads(q_BHTE), _heads(k_BGTE), _heads(v_BGTE)
    out = heads_like(q) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    job = _attention(q, k, v, out, first_BT, lse, scale)
    _attend(job, False)
    return out, lse


def attention_backward(
    q_BHTE: Tensor,
    k_BGTE: Tensor,
    v_BGTE: Tensor,
    out_BHTE: Tensor,
    lse_BHT: Tensor,
    grad_BHTE: Tensor,
    first_BT: Tensor,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (into `into`, where given)."""
    q, k, v, out, grad = (_heads(x) for x in (q_BHTE, k_BGTE, v_BGTE, out_BHTE, grad_BHTE))
    dq, dk, dv = into or (heads_like(q), heads_like(k), heads_like(v))
    job = _attention(q, k, v, out, first_BT, lse_BHT, scale)
    job.grad, job.sg = grad.data_ptr(), _strides(grad)
    job.dq, job.dk, job.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    job.sdq, job.sdk, job.sdv = _strides(dq), _strides(dk), _strides(dv)
    _attend(job, True)
    return dq, dk, dv


def _attend(job: Attention, backward: bool) -> None:
    if _call("attention", ctypes.byref(job), int(backward)):
        raise MemoryError("no memory for the scores of the attention")


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(loss_N in float32, its gradient in the logits); rows with negative targets have neither."""
    logits_NV, targets_N = _rows(logits_NV), _rows(targets_N)
    N, V = logits_NV.shape
    delta = torch.empty_like(logits_NV) if delta is None else delta
    loss = torch.empty(N, dtype=torch.float32)
    kind, threads = KINDS[logits_NV.dtype], torch.get_num_threads()
    if _call("cross_entropy", kind, logits_NV, targets_N, loss, delta, N, V, threads):
        raise MemoryError(f"no memory for a row of {V} logits")
    return loss, delta


def can_accumulate(total: Tensor, x: Tensor) -> bool:
    """Whether `accumulate` takes these."""
    return (
        x.dtype == torch.bfloat16
        and total.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.stride() == total.stride()
        and x.is_contiguous()
        and library() is not None
    )


def accumulate(total: Tensor, x: Tensor) -> None:
    """total += x, float32 and bfloat16, both contiguous and of one size."""
    _call("accumulate", total, x, total.numel(), torch.get_num_threads())
