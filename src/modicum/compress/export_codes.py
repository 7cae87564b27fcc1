"""Four-bit folders that other engines read: GPTQ's and AWQ's layout of codes in safetensors.

Both hold W = s (q - z) with z a whole number, of an input i of group g = i / group and an output o:

    gptq:  qweight (I/8, O) int32, code of input i in bits 4 (i mod 8) .. of row i/8;  qzeros (G, O/8) int32, z - 1 of
           output o in bits 4 (o mod 8) ..;  scales (G, O) float16;  g_idx (I) int32
    awq:   qweight (I, O/8), qzeros (G, O/8) int32, the n-th four bits those of output 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[n]
           of word w;  scales (G, O) float16

So forms whose zero points are whole steps are written as they are; others are refused, since rounding a zero point
moves every weight of its group by up to half a step. The embedding, the head and the norms are float16.
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
from modicum.model.safetensor import Item, SafetensorsFile, write_safetensors

Layout = Literal["gptq", "awq"]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word of AWQ's
WHOLE = 0.05  # of a step: what a zero point may be off by the rounding of its dtype


@dataclasses.dataclass(frozen=True)
class Codes:
    """codes_OI and zero_OG in 0..15, scale_OG in float16."""

    codes_OI: Tensor
    zero_OG: Tensor
    scale_OG: Tensor
    group: int


def codes_of(name: str, form: Any) -> Codes:
    """Raises `UserError` for a form that the layouts have no words for."""
    if not isinstance(form, Int4) and not (isinstance(form, Affine) and form.bits == 4):
        raise UserError(f"{name} is {type(form).__name__.lower()}; these layouts hold codes of four bits: bits=4")
    if form.in_features % form.group or form.in_features % 8 or form.out_features % 8:
        raise UserError(
            f"{name}: {form.in_features} inputs and {form.out_features} outputs are no multiples of the group "
            f"{form.group} and of 8; compress with a group that divides the inputs"
        )
    codes = unpack(form.packed, 4) if isinstance(form, Affine) else form._codes(form.packed)
    scale = form.scale.float()
    exact = 8 - form.zero.float() / torch.where(scale == 0, 1, scale)
    zero = exact.round()
    off = float((exact - zero).abs().max())
    if off > WHOLE or zero.min() < 0 or zero.max() > 15:
        raise UserError(
            f"{name}: its zero points are up to {off:.2f} steps off whole numbers, which these layouts hold alone; "
            "compress with efficientqat:bits=4, whose zero points are whole, or export --format gguf --type q4_1"
        )
    return Codes(codes, zero.to(torch.int32), form.scale.to(torch.float16), form.group)


def tensors(layout: Layout, codes: Codes, shift: int) -> dict[str, Tensor]:
    """What a layer is stored as, by the ends of its names. shift: what GPTQ's first format takes off zero points."""
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


def write(model: Decoder, out: Path, source: Path, layout: Layout) -> dict[str, Any]:
    """Write `model`, loaded from `source`, as a folder in one of the layouts; its `quantization_config`."""
    forms = {n: f for n, f in attach.forms(model).items() if n.startswith("layers.")}
    if not forms:
        raise UserError(f"{source} has no compressed layer; first: modicum compress MODEL --with efficientqat:bits=4")
    coded = {name: codes_of(name, form) for name, form in forms.items()}
    groups = {c.group for c in coded.values()}
    if len(groups) > 1:
        raise UserError(f"the layers have groups of {sorted(groups)}; these layouts have one for all")
    zeros = any(bool((c.zero_OG == 0).any()) for c in coded.values())
    shift = 0 if zeros else 1  # GPTQ's first format has no word for a zero point of 0; its second has
    settings: dict[str, Any] = {"bits": 4, "group_size": groups.pop()}
    if layout == "gptq":
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
            for end, tensor in tensors(layout, coded[names[stored]], shift).items():
                name = f"{stored.removesuffix('.weight')}.{end}"
                items.append((name, tuple(tensor.shape), tensor.dtype, tensor.clone))
        write_safetensors(file, items)
    write_json(out / "config.json", read_json(out / "config.json") | {"quantization_config": settings})
    return settings


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
