"""The settings that a matrix may be stored in, what each takes, and the choices among them (`compress.sizing`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from modicum.compress import allocate
from modicum.compress.compressors._affine import AffineConfig
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearForm

SETTINGS = tuple(AffineConfig(bits=b, group=g) for b, g in ((2, 64), (3, 64), (4, 64), (4, 32), (8, 64)))  # type: ignore[arg-type]
EMBEDDINGS = ("affine:bits=3,group=64", "int4:group=64", "int4:group=32", "int8:group=64")
PLAIN = None  # the setting of a matrix that stays as it is


def kept_tensors(model: Decoder) -> dict[str, Tensor]:
    """What stays as it is: norms, biases, an untied head, ..."""
    from modicum.model.linear import unique_tensors

    kept = {}
    for name, tensor in unique_tensors(model).items():
        matrix = name.startswith("layers.") and tensor.dim() == 2
        if not matrix and tensor is not model.embed.weight and tensor.data_ptr() != model.embed.weight.data_ptr():
            kept[name] = tensor
    return kept


def units_of(model: Decoder, names: list[str], errors: Mapping[str, list[float]] | None) -> list[allocate.Unit]:
    """Matrices in the order of the model, gate and up of a layer together; the embedding last."""
    layers = attach.linears(model)
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(name.replace(".mlp.gate", ".mlp.up"), []).append(name)
    units = []
    for members in grouped.values():
        weights = [attach.plain(layers[n])[0] for n in members]
        nbytes = [sum(_bytes(s, w) for w in weights) for s in SETTINGS]
        own = [[0.0] * len(SETTINGS) if errors is None else errors[n] for n in members]
        summed = [sum(column) for column in zip(*own, strict=True)]
        plain = sum(w.nbytes for w in weights)
        units.append(allocate.Unit(tuple(members), (*SETTINGS, PLAIN), (*nbytes, plain), (*summed, 0.0)))
    table: Any = model.embed.weight
    nbytes = [_form_bytes(Choice.parse("linear", form), table) for form in EMBEDDINGS]
    measured = [0.0] * len(EMBEDDINGS) if errors is None else errors["embed"]
    units.append(allocate.Unit(("embed",), (*EMBEDDINGS, PLAIN), (*nbytes, table.nbytes), (*measured, 0.0)))
    return units


def _bytes(setting: AffineConfig, weight_OI: Tensor) -> int:
    return _form_bytes(Choice("linear", "affine", dataclasses.asdict(setting)), weight_OI)


def _form_bytes(choice: Choice, weight_OI: Tensor) -> int:
    form: type[LinearForm] = registry.load("linear", choice.method, LinearForm).cls
    return int(form.cost(choice.config(), (weight_OI.shape[0], weight_OI.shape[1])).disk_bytes or 0)


def best_uniform(units: Sequence[allocate.Unit], budget: float) -> list[int] | None:
    """One setting for all matrices and one for the embedding: of those that fit, that of the least error."""
    fitting = []
    for layer in range(len(SETTINGS)):
        for table in range(len(EMBEDDINGS) + 1):
            chosen = [layer] * (len(units) - 1) + [table]
            nbytes, error = allocate.total(units, chosen)
            if nbytes <= budget:
                fitting.append((error, chosen))
    return min(fitting)[1] if fitting else None


def named(setting: AffineConfig | None) -> str:
    return "plain" if setting is PLAIN else f"{setting.bits} bits, group {setting.group}"


def counts(units: Sequence[allocate.Unit], chosen: Sequence[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for setting in (*SETTINGS, PLAIN):
        n = sum(len(u.names) for u, c in zip(units[:-1], chosen[:-1], strict=True) if u.settings[c] == setting)
        if n:
            counts[named(setting)] = n
    return counts
