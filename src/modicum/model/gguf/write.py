"""Writing a GGUF file: what each tensor will be stored as, then the bytes, one tensor in memory at a time."""

from __future__ import annotations

import fnmatch
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from modicum.core.errors import UserError, unknown
from modicum.core.files import atomic_file
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.families import Rule, stored_shape
from modicum.model.gguf import architectures
from modicum.model.gguf.quantize import TYPES, fits, on_grid, quantize, tensor_type

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
EMBEDDINGS = ("token_embd.weight", "output.weight")
# What stays in float32 whatever is asked for: norms, biases and factors, which graphs read as they are.
_PLAIN = ("position_embd.weight", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Stored:
    """One tensor as it will be stored: `shape` is (rows, columns), `why` it has not the type asked for."""

    name: str
    shape: tuple[int, ...]
    type: str
    why: str = ""

    @property
    def weights(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        kind = TYPES[self.type]
        return self.weights // kind.block * kind.bytes


@dataclass(frozen=True, kw_only=True)
class Types:
    """What is asked for. `matrices`: of the layers; `embeddings`: of token embedding and head (None: as the matrices,
    q8_0 where those are quantised); `fallback`: for rows that are not whole blocks of the type asked for; `patterns`:
    GGUF's name as a glob ("blk.*.ffn_down.weight") to a type, the first that matches decides."""

    matrices: str = "q8_0"
    embeddings: str | None = None
    fallback: str | None = None
    patterns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for name in (self.matrices, self.embeddings, self.fallback, *(self.patterns or {}).values()):
            if name is not None and name not in TYPES:
                raise unknown("GGUF type", name, TYPES)


def plan(model: Decoder, types: Types) -> list[Stored]:
    """How each tensor will be stored, in the file's order. Nothing is computed or written.

    Raises `UserError` for a model that llama.cpp cannot compute, a pattern that matches nothing, and rows that do
    not fit their type without a `fallback` that does.
    """
    arch = architectures.require(model.config)
    shapes = _shapes(model)
    tensors, odd = [], []
    unused = set(types.patterns or {})
    for name, rule in architectures.plan(arch, model.config, shapes).items():
        shape = stored_shape(rule, [shapes[n] for n in rule.ours])
        pattern = next((p for p in types.patterns or {} if fnmatch.fnmatchcase(name, p)), None)
        if len(shape) < 2 or name in _PLAIN:
            tensors.append(Stored(name, shape, "f32"))
            continue
        unused.discard(pattern or "")
        kind = (types.patterns or {})[pattern] if pattern else _requested(name, types)
        if fits(kind, shape[-1]):
            tensors.append(Stored(name, shape, kind))
        elif types.fallback is not None and fits(types.fallback, shape[-1]):
            why = f"rows of {shape[-1]} are not whole blocks of {TYPES[kind].block} ({kind})"
            tensors.append(Stored(name, shape, types.fallback, why))
        else:
            odd.append((name, shape[-1], kind))
    if unused:
        raise UserError(
            f"no matrix is named like {', '.join(sorted(unused))}; of: {', '.join(s.name for s in tensors[:4])}, ..."
        )
    if odd:
        name, columns, kind = odd[0]
        fitting = ", ".join(n for n in TYPES if fits(n, columns) and n != "f32")
        raise UserError(
            f"{len(odd)} matrices ({name}, ...) have rows of {columns} weights, which are not whole blocks of "
            f"{TYPES[kind].block} as {kind} needs; say what they are stored as: --fallback with one of {fitting}"
        )
    tensors += [Stored(name, tuple(x.shape), "f32") for name, x in architectures.rope_tensors(model.config).items()]
    return tensors


def _requested(name: str, types: Types) -> str:
    if name not in EMBEDDINGS:
        return types.matrices
    return types.embeddings or ("q8_0" if TYPES[types.matrices].block > 1 else types.matrices)


def _parameters(model: Decoder) -> dict[str, Tensor]:
    if attach.forms(model):
        raise ValueError("merge the model's linear forms before it is written as GGUF")
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    arch = architectures.architecture(model.config)
    if model.lm_head.weight is model.embed.weight and arch.tied is not False:
        parameters.pop("lm_head.weight")
    return parameters


def _shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in _parameters(model).items()}


def write(
    model: Decoder,
    path: str | Path,
    types: Types,
    *,
    vocabulary: Mapping[str, Any] | None = None,
    name: str = "",
    grids: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Stored]:
    """Write a model without linear forms (`attach.merge` them first) as one GGUF file; what was stored.

    grids: by parameter, step and minimum (O, I / 32) of weights that lie on sixteen values in each block already; they
    are taken over where the type is q4_1, so that nothing is rounded twice. vocabulary: the tokenizer's metadata; None
    writes a file for prompts of token ids. progress is called with the weights of each tensor when it is written. The
    file appears whole or not at all.
    """
    stored = plan(model, types)
    arch, parameters = architectures.require(model.config), _parameters(model)
    rules = architectures.plan(arch, model.config, parameters)
    extra = architectures.rope_tensors(model.config)

    def tensor(item: Stored) -> Tensor:
        if item.name in extra:
            return extra[item.name]
        rule: Rule = rules[item.name]
        return architectures.to_gguf(arch, model.config, rule, [parameters[n].detach().cpu() for n in rule.ours])

    metadata: dict[str, Any] = {"general.type": "model"} | ({"general.name": name} if name else {})
    metadata |= architectures.metadata(model.config)
    metadata |= {"general.file_type": tensor_type(types.matrices).file_type, "general.quantization_version": 2}
    metadata |= vocabulary if vocabulary is not None else {"tokenizer.ggml.model": "no_vocab"}

    def encoded(item: Stored) -> Tensor:
        names = rules[item.name].ours if item.name in rules else ()
        if item.type != "q4_1" or not names or not all(n in (grids or {}) for n in names):
            return quantize(tensor(item), item.type)
        columns = zip(*((grids or {})[n] for n in names), strict=True)  # steps of all, minima of all
        step, low = (architectures.to_gguf(arch, model.config, rules[item.name], [*c]) for c in columns)
        return on_grid(tensor(item), step, low)

    items = [(s, (lambda s=s: encoded(s))) for s in stored]
    write_file(path, metadata, items, progress)
    return stored


# The container --------------------------------------------------------------------------------------


def write_file(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[Stored, Callable[[], Tensor]]],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Metadata and tensors as one file. Each tensor comes with what makes its bytes, called when they are due.

    Values: bool, int (unsigned 32 bits, signed where negative), float (32 bits), str and lists of one of these.
    """
    items = list(tensors)
    head, offset = bytearray(), 0
    head += MAGIC + struct.pack("<IQQ", VERSION, len(items), len(metadata))
    for key, value in metadata.items():
        head += _text(key) + _value(value)
    for item, _ in items:
        head += _text(item.name) + struct.pack("<I", len(item.shape))
        head += struct.pack(f"<{len(item.shape)}Q", *reversed(item.shape))  # the row's length comes first
        head += struct.pack("<IQ", TYPES[item.type].code, offset)
        offset += item.bytes + -item.bytes % ALIGNMENT
    head += bytes(-len(head) % ALIGNMENT)
    with atomic_file(path) as file:
        file.write(head)
        for item, make in items:
            _write_tensor(file, item, make())
            if progress:
                progress(item.weights)


def _write_tensor(file: BinaryIO, item: Stored, data: Tensor) -> None:
    if data.nbytes != item.bytes:
        raise ValueError(f"{item.name}: announced {item.bytes} bytes, made {data.nbytes}")
    file.write(data.contiguous().view(-1).numpy().data)
    file.write(bytes(-item.bytes % ALIGNMENT))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _kind(value: Any) -> tuple[int, str]:
    """GGUF's number for a value's type, and struct's letter for one that has a fixed size."""
    if isinstance(value, bool):
        return 7, "?"
    if isinstance(value, int):
        return (4, "I") if value >= 0 else (5, "i")
    if isinstance(value, float):
        return 6, "f"
    if isinstance(value, str):
        return 8, ""
    raise ValueError(f"no GGUF value: {value!r}")


def _value(value: Any) -> bytes:
    if isinstance(value, list | tuple):
        code, letter = (5, "i") if type(value[0]) is int else _kind(value[0])
        body = b"".join(map(_text, value)) if not letter else struct.pack(f"<{len(value)}{letter}", *value)
        return struct.pack("<IIQ", 9, code, len(value)) + body
    code, letter = _kind(value)
    return struct.pack("<I", code) + (struct.pack(f"<{letter}", value) if letter else _text(value))
