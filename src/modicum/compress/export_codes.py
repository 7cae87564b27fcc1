"""Folders of codes that other engines read: GPTQ's, AWQ's and compressed-tensors' layouts in safetensors.

All hold W = s (q - z) with z a whole number, of an input i of group g = i / group and an output o:

    gptq:  qweight (I/8, O) int32, code of input i in bits 4 (i mod 8) .. of row i/8;  qzeros (G, O/8) int32, z - 1 of
           output o in bits 4 (o mod 8) ..;  scales (G, O) float16;  g_idx (I) int32
    awq:   qweight (I, O/8), qzeros (G, O/8) int32, the n-th four bits those of output 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[n]
           of word w;  scales (G, O) float16
    compressed-tensors (`pack-quantized`; vLLM's own, and read by transformers with the package compressed-tensors):
           weight_packed (O, I bits/32) int32, input i from bit i bits of the row on;  weight_zero_point (O bits/32, G)
           int32, output o from bit o bits of the column on, none where all are 2^(bits-1);  weight_scale (O, G);
           weight_shape

The first two hold four bits alone, the third 2, 3, 4 and 8. Forms whose zero points are whole steps are written as they
are; others are refused, since rounding a zero point moves every weight of its group by up to half a step. Embedding,
head and norms are float16.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.core.files import read_json, write_json
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.families import Rule, expand
from modicum.model.folder import save_model
from modicum.model.linear.affine import Affine, unpack
from modicum.model.linear.int4 import Int4
from modicum.model.linear.int8 import Int8
from modicum.model.safetensor import Item, SafetensorsFile, write_safetensors

Layout = Literal["gptq", "awq", "compressed-tensors"]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word of AWQ's
WHOLE = 0.05  # of a step: what a zero point may be off by the rounding of its dtype


@dataclasses.dataclass(frozen=True)
class Codes:
    """codes_OI and zero_OG in 0..2^bits - 1, scale_OG in float16; group 0: all inputs of an output."""

    bits: int
    codes_OI: Tensor
    zero_OG: Tensor
    scale_OG: Tensor
    group: int

    @property
    def symmetric(self) -> bool:
        return bool((self.zero_OG == 1 << (self.bits - 1)).all())


def codes_of(name: str, form: Any, layout: Layout = "gptq") -> Codes:
    """Raises `UserError` for a form that the layout has no words for."""
    kind, bits = type(form).__name__.lower(), getattr(form, "bits", {Int4: 4, Int8: 8}.get(type(form), 0))
    if not isinstance(form, Int4 | Int8 | Affine) or (layout != "compressed-tensors" and bits != 4):
        words = "codes of form int4, int8 or affine" if layout == "compressed-tensors" else "codes of four bits: bits=4"
        raise UserError(f"{name} is {kind} of {bits or 16} bits; {layout} holds {words}")
    unit = 32 if layout == "compressed-tensors" else 8
    if form.in_features % form.group or form.in_features % unit or form.out_features % unit:
        raise UserError(
            f"{name}: {form.in_features} inputs and {form.out_features} outputs are no multiples of the group "
            f"{form.group} and of {unit}; compress with a group that divides the inputs"
        )
    scale, middle = form.scale.float(), 1 << (bits - 1)
    if isinstance(form, Int8):
        codes, zero = form.codes.to(torch.int32) + middle, torch.full_like(form.scale, middle, dtype=torch.int32)
        return Codes(bits, codes, zero, form.scale.to(torch.float16), form.group if form.n_groups > 1 else 0)
    codes = unpack(form.packed, bits) if isinstance(form, Affine) else form._codes(form.packed)
    exact = middle - form.zero.float() / torch.where(scale == 0, 1, scale)
    zero = exact.round()
    off = float((exact - zero).abs().max())
    if off > WHOLE or zero.min() < 0 or zero.max() >= 1 << bits:
        raise UserError(
            f"{name}: its zero points are up to {off:.2f} steps off whole numbers, which {layout} holds alone; "
            f"compress with efficientqat:bits={bits}, whose zero points are whole, or export --format gguf --type q4_1"
        )
    return Codes(bits, codes, zero.to(torch.int32), form.scale.to(torch.float16), form.group)


def tensors(layout: Layout, codes: Codes, shift: int, symmetric: bool = False) -> dict[str, Tensor]:
    """What a layer is stored as, by the ends of its names. shift: what GPTQ's first format takes off zero points.
    symmetric: compressed-tensors' has no zero points, here nor in any other layer."""
    if layout == "compressed-tensors":
        made = {
            "weight_packed": _dense(codes.codes_OI, codes.bits),
            "weight_scale": codes.scale_OG,
            "weight_shape": torch.tensor(codes.codes_OI.shape),
        }
        if not symmetric:
            made["weight_zero_point"] = _dense(codes.zero_OG.T, codes.bits).T.contiguous()
        return made
    q_IO, z_GO, scales_GO = codes.codes_OI.T.to(torch.int32), codes.zero_OG.T, codes.scale_OG.T.contiguous()
    if layout == "awq":
        order = list(ORDER)
        return {
            "qweight": _words(q_IO.unflatten(1, (-1, 8))[..., order]),
            "qzeros": _words(z_GO.unflatten(1, (-1, 8))[..., order]),
            "scales": scales_GO,
        }
    return {
        "qweight": _words(q_IO.unflatten(0, (-1, 8)).transpose(1, 2)),
        "qzeros": _words((z_GO - shift).unflatten(1, (-1, 8))),
        "scales": scales_GO,
        "g_idx": torch.arange(len(q_IO), dtype=torch.int32) // codes.group,
    }


def _words(fields_XY8: Tensor) -> Tensor:
    """Eight numbers of four bits to one int32, the first in the lowest bits."""
    shifted = fields_XY8.to(torch.int64) << (4 * torch.arange(8))
    return (shifted.sum(-1) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def _dense(numbers_XY: Tensor, bits: int) -> Tensor:
    """int32 (X, Y bits / 32): the numbers of a row one after another, the lowest bit of the first one first."""
    bits_XYb = numbers_XY.to(torch.int64)[..., None] >> torch.arange(bits) & 1
    words_XW32 = bits_XYb.flatten(1).unflatten(1, (-1, 32))
    return (words_XW32 << torch.arange(32)).sum(-1).to(torch.uint32).view(torch.int32)


def write(model: Decoder, out: Path, source: Path, layout: Layout) -> dict[str, Any]:
    """Write `model`, loaded from `source`, as a folder in one of the layouts; its `quantization_config`."""
    forms = {n: f for n, f in attach.forms(model).items() if n.startswith("layers.")}
    if not forms:
        raise UserError(f"{source} has no compressed layer; first: modicum compress MODEL --with efficientqat:bits=4")
    coded = {name: codes_of(name, form, layout) for name, form in forms.items()}
    groups, widths = {c.group for c in coded.values()}, {c.bits for c in coded.values()}
    if max(len(groups), len(widths)) > 1:
        raise UserError(f"the layers have groups of {sorted(groups)} and {sorted(widths)} bits; one for all is written")
    zeros = any(bool((c.zero_OG == 0).any()) for c in coded.values())
    shift = 0 if zeros else 1  # GPTQ's first format has no word for a zero point of 0; its second has
    symmetric = all(c.symmetric for c in coded.values())
    settings: dict[str, Any] = {"bits": 4, "group_size": groups.pop()}
    if layout == "compressed-tensors":
        settings = _scheme(widths.pop(), settings["group_size"], symmetric)
    elif layout == "gptq":
        version = "gptq_v2" if zeros else "gptq"
        settings |= {"quant_method": "gptq", "desc_act": False, "sym": False, "checkpoint_format": version}
    else:
        settings |= {"quant_method": "awq", "version": "gemm", "zero_point": True}
    with torch.no_grad():
        attach.merge(model)
    model.to(torch.float16)
    names = _stored_names(model, list(coded))
    save_model(model, out, source)
    (file,) = out.glob("*.safetensors")
    items: list[Item] = []
    with SafetensorsFile(file) as dense:
        for stored in dense.names:
            if stored not in names:
                items.append((stored, tuple(dense.shape(stored)), dense.dtype(stored), partial(dense.read, stored)))
                continue
            for end, tensor in tensors(layout, coded[names[stored]], shift, symmetric).items():
                name = f"{stored.removesuffix('.weight')}.{end}"
                items.append((name, tuple(tensor.shape), tensor.dtype, tensor.clone))
        write_safetensors(file, items)
    write_json(out / "config.json", read_json(out / "config.json") | {"quantization_config": settings})
    return settings


def _scheme(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def _stored_names(model: Decoder, layers: list[str]) -> dict[str, str]:
    """The name of each layer's weight in the family's files, with the layer's own."""
    rules = expand(model.config, [f"{name}.weight" for name in layers])
    odd = [r for r in rules.values() if r.transposed or r.by_head or len(r.ours) > 1]
    if odd or len(rules) != len(layers):
        raise UserError(
            f"a {model.config.family} folder stores several matrices as one or turned, which these layouts do not; "
            "export --format gguf"
        )
    return {stored: _layer(rule) for stored, rule in rules.items()}


def _layer(rule: Rule) -> str:
    return rule.ours[0].removesuffix(".weight")
