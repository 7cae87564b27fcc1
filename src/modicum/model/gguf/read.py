"""Reading a GGUF file: its header, the model's config, and weights from the mapped file.

Matrices in Q4_0, Q4_1 and Q8_0 may keep their codes: they become the linear forms int4 and int8 with groups of 32
(scale d, codes q: d (q - 8), d q + m, d q), re-laid but not rounded, which the CPU kernels multiply with. Every other
type is dequantised by the `gguf` package, one tensor at a time. Shapes are those of this package, rows first.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.core.errors import CorruptError, UserError, unknown
from modicum.model.config import DecoderConfig, Rope
from modicum.model.families import Rule, stored_shape
from modicum.model.gguf import architectures
from modicum.model.gguf.architectures import ARCHITECTURES, KEYS, Architecture

FILE = "model.gguf"  # in a model folder that keeps its weights in this format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
KEPT = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}
GROUP = 32


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its GGML type, shape (rows first) and where its bytes begin."""

    name: str
    type: Any
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """A mapped GGUF file: `metadata` by key and `tensors` by name. Raises `CorruptError` for anything out of bounds."""

    def __init__(self, path: str | Path):
        import gguf

        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CorruptError(f"{path} is {size} bytes long, which is no GGUF file; fetch it again")
            # A private mapping: pages are shared until somebody writes to a weight in place.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._at = 0
        try:
            magic, version, n_tensors, n_keys = self._unpack("<4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise CorruptError(f"{path} is no GGUF file of version 2 or 3; fetch it again")
            self.metadata: dict[str, Any] = {}
            for _ in range(n_keys):
                key = self._text()
                self.metadata[key] = self._value(self._unpack("<I")[0])
            headers = [self._header() for _ in range(n_tensors)]
        except (struct.error, UnicodeDecodeError, OverflowError, KeyError) as error:
            raise CorruptError(f"{path}: its header is damaged ({error}); fetch the file again") from None
        alignment = int(self.metadata.get("general.alignment", 32))
        start = self._at + -self._at % alignment
        self.tensors: dict[str, Entry] = {}
        for name, shape, code, offset in headers:
            kind = _type(code, name, self.path)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            nbytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
            if shape[-1] % block or start + offset + nbytes > size:
                raise CorruptError(f"{path}: tensor {name} does not lie within the file; fetch it again")
            self.tensors[name] = Entry(name, kind, shape, start + offset, nbytes)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self._map, self._at)
        self._at += struct.calcsize(form)
        return found

    def _text(self) -> str:
        (length,) = self._unpack("<Q")
        if length > len(self._map) - self._at:
            raise struct.error("a text longer than the file")
        self._at += length
        return self._map[self._at - length : self._at].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            return self._unpack(f"<{_SCALARS[kind]}")[0]
        inner, count = self._unpack("<IQ")
        if count > len(self._map):
            raise struct.error("a list longer than the file")
        if inner in (_TEXT, _LIST):
            return [self._value(inner) for _ in range(count)]
        return list(self._unpack(f"<{count}{_SCALARS[inner]}"))

    def _header(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (dims,) = self._unpack("<I")
        if dims > 4:
            raise struct.error(f"tensor {name} has {dims} dimensions")
        shape = self._unpack(f"<{dims}Q")
        code, offset = self._unpack("<IQ")
        return name, tuple(int(n) for n in reversed(shape)), code, offset

    def raw(self, entry: Entry) -> Tensor:
        """The stored bytes as uint8 (rows, bytes of a row): a view of the mapped file."""
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
        return flat.view(*entry.shape[:-1], -1)

    def values(self, entry: Entry) -> Tensor:
        """The tensor's values: 16 and 32-bit floats as they are (views), other types in float32."""
        import gguf

        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        raw = self.raw(entry)
        if entry.type.name in plain:
            return raw.view(plain[entry.type.name]).view(entry.shape)
        if entry.type.name in KEPT and len(entry.shape) == 2:
            return _dequantised(entry.type.name, raw)
        try:
            return torch.from_numpy(gguf.dequantize(raw.numpy(), entry.type)).view(entry.shape)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {entry.name} is stored as {entry.type.name}, which cannot be dequantised here; "
                "give a file of another type, for instance Q4_K_M or Q8_0"
            ) from None


def _type(code: int, name: str, path: Path) -> Any:
    import gguf

    try:
        return gguf.GGMLQuantizationType(code)
    except ValueError:
        raise UserError(f"{path}: tensor {name} has type number {code}, which is not known here") from None


# The model's shape --------------------------------------------------------------------------------------


def architecture(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    found = {a.name: a for a in ARCHITECTURES}
    if name not in found:
        raise unknown("GGUF architecture", name, found, f"{file.path} holds a model of another kind.")
    return found[str(name)]


def config(file: GGUFFile) -> DecoderConfig:
    """The shape that the metadata and the names of the tensors describe. Raises `UserError` for what they lack."""
    arch = architecture(file)

    def key(name: str, default: Any = None) -> Any:
        return file.metadata.get(f"{arch.name}.{name}", default)

    fields: dict[str, Any] = {"family": arch.families[0], **arch.fixed}
    fields |= {ours: key(theirs) for theirs, ours in KEYS.items() if key(theirs) is not None}
    lacking = {"width", "layers", "heads", "mlp_width"} - fields.keys()
    if lacking:
        raise UserError(f"{file.path} lacks {', '.join(sorted(lacking))} in its metadata; give another file")
    for name in ("kv_heads", "mlp_width", "heads"):
        value = fields.get(name)
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise UserError(f"{file.path}: layers differ in {name}, which this decoder does not build")
            fields[name] = value[0]
    fields.setdefault("kv_heads", fields["heads"])
    fields.setdefault("head_dim", fields["width"] // fields["heads"])
    fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    fields["norm_eps"] = _decimal(key("attention.layer_norm_rms_epsilon") or key("attention.layer_norm_epsilon", 1e-5))
    fields["tied"] = "output.weight" not in file.tensors
    if "qkv_bias" in arch.free:
        fields["qkv_bias"] = "blk.0.attn_q.bias" in file.tensors
        fields["o_bias"] = "blk.0.attn_output.bias" in file.tensors
        fields["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    if arch.name == "gptneox":
        fields |= {"parallel": bool(key("use_parallel_residual", True)), "activation": "gelu"}
    fields["attention_softcap"] = _optional(key("attn_logit_softcapping"))
    fields["logit_softcap"] = _optional(key("final_logit_softcapping"))
    if arch.name.startswith("gemma"):
        fields["embed_scale"] = fields["width"] ** 0.5
    if (arch.name, fields["layers"]) in (("gemma2", 46), ("gemma3", 62)):
        fields["scale"] = (fields["width"] / fields["heads"]) ** -0.5
    if arch.name == "smollm3":
        fields["rope_layers"] = tuple((i + 1) % 4 != 0 for i in range(fields["layers"]))
    fields |= _windows(arch, key, fields["layers"]) | _ropes(file, arch, key, fields)
    tokens = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    ends = [tokens[name] for name in ("eos", "eot") if tokens[name] is not None]
    fields |= {"bos_id": tokens["bos"], "pad_id": tokens["padding"], "eos_ids": tuple(dict.fromkeys(ends))}
    return DecoderConfig(**fields)


def _decimal(value: float) -> float:
    """A 32-bit float as the decimal number it was written for."""
    return float(f"{value:.6g}")


def _optional(value: float | None) -> float | None:
    return None if not value else _decimal(value)


def _windows(arch: Architecture, key: Any, layers: int) -> dict[str, Any]:
    window = key("attention.sliding_window")
    if arch.name not in ("gemma2", "gemma3") or not window:
        return {}
    # Files without the list leave it to the graph: every other layer of Gemma 2, five of six of Gemma 3 slide.
    sliding = key("attention.sliding_window_pattern")
    if not isinstance(sliding, list):
        every = int(sliding or {"gemma2": 2, "gemma3": 6}[arch.name])
        sliding = [(i + 1) % every != 0 for i in range(layers)]
    return {"windows": tuple(int(window) if slides else None for slides in sliding[:layers])}


def _ropes(file: GGUFFile, arch: Architecture, key: Any, fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("position") == "learned":
        return {}
    theta = float(key("rope.freq_base", 10000.0))
    fraction = float(key("rope.dimension_count", fields["head_dim"])) / fields["head_dim"]
    scaling = key("rope.scaling.type", "none")
    options: dict[str, Any] = {}
    if scaling in ("linear", "yarn"):
        options["factor"] = _decimal(key("rope.scaling.factor"))
    if scaling == "yarn":
        options["original_max_position_embeddings"] = key("rope.scaling.original_context_length")
        options |= {
            name: _decimal(value) for name in ("beta_fast", "beta_slow") if (value := key(f"rope.scaling.yarn_{name}"))
        }
    if "rope_factors_long.weight" in file.tensors:
        scaling = "longrope"
        options = {
            f"{kind}_factor": file.values(file.tensors[f"rope_factors_{kind}.weight"]).tolist()
            for kind in ("long", "short")
        } | {"original_max_position_embeddings": key("rope.scaling.original_context_length")}
    elif "rope_freqs.weight" in file.tensors:
        scaling, options = "llama3", _llama3(file, theta, int(fields["head_dim"] * fraction))
    rope = Rope(theta=theta, fraction=fraction, kind="default" if scaling == "none" else scaling, options=options)
    found: dict[str, Any] = {"rope": rope}
    if arch.name == "gemma3":
        found["rope_local"] = Rope(theta=float(key("rope.freq_base_swa", 10000.0)))
    return found


def _llama3(file: GGUFFile, theta: float, dims: int) -> dict[str, Any]:
    """Llama 3's four numbers, of which a file keeps only the factors they give: those of its published models."""
    factors = file.values(file.tensors["rope_freqs.weight"]).double()
    factor = float(f"{factors.max().item():.6g}")
    options = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    options["original_max_position_embeddings"] = 8192
    wave = 2 * torch.pi * theta ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    smooth = (8192 / wave - 1.0) / 3.0
    wanted = torch.where(wave < 2048, 1.0, torch.where(wave > 8192, factor, 1 / ((1 - smooth) / factor + smooth)))
    if not torch.allclose(factors, wanted, rtol=1e-4):
        raise UserError(f"{file.path} stretches its positions in a way that is not Llama 3's; it is not read")
    return options


# Weights ------------------------------------------------------------------------------------------------


def described_forms(file: GGUFFile, shape: DecoderConfig, dtype: torch.dtype) -> dict[str, Any] | None:
    """Which matrices keep their codes, as the description that `form_state.restore` reads; None if none does."""
    entries: dict[str, Any] = {}
    rules = _rules(file, shape)
    for stored, rule in rules.items():
        entry = file.tensors[stored]
        if entry.type.name not in KEPT or not rule.ours[0].endswith(".weight") or stored == "position_embd.weight":
            continue
        rows = _rows(shape, rule, entry)
        for name, out in zip(rule.ours, rows, strict=True):
            module = name.removesuffix(".weight")
            bias = f"{module}.bias" in _names(rules)
            entries[module] = _described(entry.type.name, entry.shape[1], out, bias, dtype)
            if module == "embed":
                entries[module] |= {"embedding": True, "tied": ["lm_head"] if shape.tied else []}
    return {"version": 1, "forms": entries} if entries else None


def _described(kind: str, into: int, out: int, bias: bool, dtype: torch.dtype) -> dict[str, Any]:
    # Q4_1's zero point m + 8 d is no 16-bit number.
    scale = "float32" if kind == "Q4_1" else "float16"
    return {
        "form": {"method": KEPT[kind], "group": GROUP, "scale_dtype": scale},
        "in": into,
        "out": out,
        "bias": bias,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": {},
        "base": None,
    }


def _names(rules: dict[str, Rule]) -> set[str]:
    return {name for rule in rules.values() for name in rule.ours}


def _rules(file: GGUFFile, shape: DecoderConfig) -> dict[str, Rule]:
    """Stored name -> rule for every tensor of the file that is a weight. Raises `UserError` for an unknown one."""
    arch = architecture(file)
    found = {}
    for rule in arch.rules:
        for layer in range(shape.layers if "*" in rule.theirs else 1):
            theirs, *ours = (name.replace("*", str(layer)) for name in (rule.theirs, *rule.ours))
            if theirs in file.tensors:
                found[theirs] = Rule(theirs, tuple(ours))
    factors = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    strange = sorted(file.tensors.keys() - found.keys() - factors)
    if strange:
        raise UserError(
            f"{file.path} holds {len(strange)} tensors that a {arch.name} model does not have ({strange[0]}, ...); "
            "it is a variant that this decoder does not build"
        )
    return found


def _rows(shape: DecoderConfig, rule: Rule, entry: Entry) -> list[int]:
    """Rows of each parameter that a stored matrix holds."""
    if len(rule.ours) == 1:
        return [entry.shape[0]]
    if len(rule.ours) == 2:  # gate and up
        return [entry.shape[0] // 2] * 2
    return [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]


def parameters(
    file: GGUFFile, shape: DecoderConfig, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name, values in `dtype`) of the tensors whose parameters are all in `shapes`; the rest is kept in
    codes. Raises `CorruptError` for a misshapen tensor."""
    arch = architecture(file)
    for stored, rule in _rules(file, shape).items():
        if not all(name in shapes for name in rule.ours):
            continue
        wanted = [shapes[name] for name in rule.ours]
        entry = file.tensors[stored]
        if entry.shape != stored_shape(rule, wanted):
            raise CorruptError(
                f"{file.path}: {stored} has shape {entry.shape}, its metadata asks for {stored_shape(rule, wanted)}"
            )
        values = file.values(entry)
        for name, value in zip(rule.ours, architectures.from_gguf(arch, shape, rule, values, wanted), strict=True):
            yield name, value.to(dtype)


def codes(file: GGUFFile, shape: DecoderConfig, kept: set[str]) -> Iterator[tuple[str, Tensor]]:
    """(buffer's name, tensor) of the forms that hold the modules named in `kept`."""
    arch = architecture(file)
    for stored, rule in _rules(file, shape).items():
        modules = [name.removesuffix(".weight") for name in rule.ours]
        if not rule.theirs.endswith(".weight") or not set(modules) <= kept:
            continue
        entry = file.tensors[stored]
        raw_OB = file.raw(entry)
        sizes: list[tuple[int, ...]] = [(rows, raw_OB.shape[1]) for rows in _rows(shape, rule, entry)]
        # Rows move (queries and keys are interleaved) and split as they do in values.
        for module, part_OB in zip(modules, architectures.from_gguf(arch, shape, rule, raw_OB, sizes), strict=True):
            prefix = "embed.form" if module == "embed" else module
            for name, tensor in _relaid(entry.type.name, part_OB).items():
                yield f"{prefix}.{name}", tensor


def _dequantised(kind: str, raw_OB: Tensor) -> Tensor:
    """weight_OI in float32 of blocks in Q4_0, Q4_1 or Q8_0, rounded as ggml does: d (q - 8), d q + m, d q."""
    header = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}[kind]
    blocks = raw_OB.reshape(raw_OB.shape[0], -1, header + (32 if kind == "Q8_0" else 16))
    numbers = blocks[..., :header].contiguous().view(torch.float16).float()
    body = blocks[..., header:]
    if kind == "Q8_0":
        return (body.contiguous().view(torch.int8).float() * numbers[..., :1]).flatten(1)
    values = torch.cat([body & 15, body >> 4], -1).float()
    if kind == "Q4_0":
        return (values.sub_(8).mul_(numbers[..., :1])).flatten(1)
    return values.mul_(numbers[..., :1]).add_(numbers[..., 1:]).flatten(1)


def _relaid(kind: str, raw_OB: Tensor) -> dict[str, Tensor]:
    """Blocks of 32 (scale d, minimum m, codes) as the buffers of the forms int4 and int8 with group=32."""
    out = raw_OB.shape[0]
    header = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}[kind]
    size = header + (32 if kind == "Q8_0" else 16)
    blocks = raw_OB.reshape(out, -1, size)
    numbers = blocks[..., :header].contiguous().view(torch.float16)  # (O, G, 1 or 2)
    body = blocks[..., header:].contiguous()
    if kind == "Q8_0":
        return {"codes": body.view(torch.int8).flatten(1), "scale": numbers[..., 0].contiguous()}
    # Code i is the low half of byte i, code i + 16 the high half; the form has even inputs low and odd ones high.
    # Two bytes at a time, as one number: codes of the inputs i and i + 1 become one byte.
    pair = body.view(torch.int16)
    low, high = (pair & 0x0F) | ((pair >> 4) & 0xF0), ((pair >> 4) & 0x0F) | ((pair >> 8) & 0xF0)
    packed = torch.cat([low, high], -1).to(torch.uint8).flatten(1)
    if kind == "Q4_0":
        scale = numbers[..., 0].contiguous()
        return {"packed": packed, "scale": scale, "zero": torch.zeros_like(scale)}
    scale, minimum = numbers.float().unbind(-1)
    return {"packed": packed, "scale": scale.contiguous(), "zero": minimum + 8 * scale}


# As a folder --------------------------------------------------------------------------------------------


def folder_files(path: str | Path) -> dict[str, bytes]:
    """config.json, tokenizer and chat template that a Hugging Face folder would have, from the file's metadata."""
    import json
    import logging
    import tempfile

    import transformers

    from modicum.model.families import write_config

    file = GGUFFile(path)
    shape = config(file)
    if shape.family in ("gemma2", "gemma3"):
        shape = dataclasses.replace(shape, scale=shape.attention_scale(0))  # config.json has to spell it out
    written = write_config(shape, "bfloat16")
    generation = {"bos_token_id": shape.bos_id, "eos_token_id": list(shape.eos_ids), "pad_token_id": shape.pad_id}
    found = {"config.json": written, "generation_config.json": {k: v for k, v in generation.items() if v is not None}}
    files = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in found.items()}
    if file.metadata.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        return files
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="modicum-gguf-") as scratch:
        source = Path(path).resolve()
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        tokenizer.save_pretrained(scratch)
        files |= {p.name: p.read_bytes() for p in sorted(Path(scratch).iterdir()) if p.is_file()}
    return files
