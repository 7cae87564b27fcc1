"""Families: how each open model family writes a decoder down as Hugging Face files.

A family is one file here holding `FAMILY`: which `model_type`s it reads, how keys of config.json and names of
weights map to `DecoderConfig` and `Decoder`, in both directions. It is found by its place; adding one touches
nothing else. Files beginning with an underscore are shared tables.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum.core.errors import UserError, unknown
from modicum.model.config import DecoderConfig

Keys = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """One stored tensor and the parameters it holds.

    `*` stands for the layer's number. Several parameters in `ours` are stored one after another along the
    output dimension; `transposed`: stored as (in, out); `by_head`: stored as (heads, parts, head_dim, in).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False


def rules(table: str, **how: bool) -> tuple[Rule, ...]:
    """Rules from lines of `their.name  our.name`; `layers.*.attention.{q,k,v}.bias` names three in order."""
    expanded = []
    for line in table.strip().splitlines():
        theirs, ours = line.split()
        head, brace, rest = ours.partition("{")
        parts, _, tail = rest.partition("}")
        expanded.append(Rule(theirs, tuple(head + p + tail for p in parts.split(",")) if brace else (ours,), **how))
    return tuple(expanded)


@dataclass(frozen=True, kw_only=True)
class Family:
    """`keys` maps config.json's key to the `DecoderConfig` field with the same meaning, both ways.

    `defaults` are values config.json may leave out; `fixed` are fields the family never varies; `read` and
    `write` handle what is not one to one (from config.json completed by `defaults`; to config.json's keys).
    `rules` empty: weights are stored under the decoder's own names. `ignored`: patterns of stored names that are no
    parameters. `prefix` is what names carry in a whole model but may lack in a file; `aliases` are names that older
    files use.
    """

    model_types: tuple[str, ...]
    architecture: str
    keys: dict[str, str]
    defaults: Keys = field(default_factory=dict)
    fixed: Keys = field(default_factory=dict)
    read: Callable[[Keys], Keys] = field(default=lambda hf: {})
    write: Callable[[DecoderConfig], Keys] = field(default=lambda config: {})
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    aliases: Keys = field(default_factory=dict)


@functools.cache
def families() -> dict[str, Family]:
    """Every family by name."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def read_config(hf: Keys, where: str = "config.json") -> DecoderConfig:
    """From a Hugging Face config. Raises `UserError` for what cannot be built faithfully."""
    by_type = {t: name for name, family in families().items() for t in family.model_types}
    model_type = hf.get("model_type")
    if model_type not in by_type:
        raise unknown(f"model_type in {where}", model_type, by_type, "Give a model of one of these types")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise UserError(
            f"{where} describes quantised weights ({method}); "
            "give the unquantised checkpoint, and compress it with: modicum compress"
        )
    family = families()[by_type[model_type]]
    full = family.defaults | hf
    fields: Keys = {"family": by_type[model_type], **family.fixed}
    for theirs, ours in family.keys.items():
        if full.get(theirs) is None:
            raise UserError(f"{where} lacks {theirs!r}, which a {model_type} model needs; add it to the file")
        fields[ours] = full[theirs]
    fields |= family.read(full)
    eos = hf.get("eos_token_id")
    fields |= {
        "bos_id": hf.get("bos_token_id"),
        "pad_id": hf.get("pad_token_id"),
        "eos_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    }
    return DecoderConfig(**fields, source=dict(hf))


def write_config(config: DecoderConfig, dtype: str) -> Keys:
    """The config.json of `config`. One that was read and not changed comes back as it was, dtype aside."""
    family = families().get(config.family)
    if family is None:
        raise unknown("family", config.family, families())
    dtype_key = "torch_dtype" if "torch_dtype" in config.source else "dtype"
    if config.source and read_config(config.source) == config:
        return config.source | {dtype_key: dtype}
    written: Keys = {"architectures": [family.architecture], "model_type": family.model_types[0]}
    written |= {theirs: getattr(config, ours) for theirs, ours in family.keys.items()} | family.write(config)
    written |= {
        "bos_token_id": config.bos_id,
        "pad_token_id": config.pad_id,
        dtype_key: dtype,
        "use_cache": True,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) > 1 else next(iter(config.eos_ids), None),
    }
    written = config.source | written
    again = read_config(written)
    if again != config:
        lost = [k for k in config.__dataclass_fields__ if k != "source" and getattr(again, k) != getattr(config, k)]
        shown = ", ".join(f"{k}={getattr(config, k)!r}" for k in lost)
        raise UserError(
            f"a {config.family} config.json cannot say {shown}; choose another family for this shape: modicum can say "
            f"any (families: {', '.join(families())})"
        )
    return written


def expand(config: DecoderConfig, names: Iterable[str]) -> dict[str, Rule]:
    """Stored name -> rule, layer numbers filled in, for the rules whose parameters are all among `names`."""
    have, rules = set(names), families()[config.family].rules
    if not rules:
        return {name: Rule(name, (name,)) for name in names}
    tensors = {}
    for rule in rules:
        for layer in range(config.layers if "*" in rule.theirs else 1):
            ours = tuple(name.replace("*", str(layer)) for name in rule.ours)
            if all(name in have for name in ours):
                tensors[rule.theirs.replace("*", str(layer))] = Rule(
                    rule.theirs.replace("*", str(layer)), ours, rule.transposed, rule.by_head
                )
    return tensors


def is_ignored(config: DecoderConfig, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in families()[config.family].ignored)


def stored_shape(rule: Rule, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the stored tensor, from its parameters' shapes."""
    rows = sum(shape[0] for shape in shapes)
    shape = (rows, *shapes[0][1:])
    return shape[::-1] if rule.transposed else shape


def unpack(rule: Rule, stored: Any, shapes: list[tuple[int, ...]], head_dim: int) -> list[Any]:
    """Parameters from the stored tensor (views where possible)."""
    if rule.transposed:
        stored = stored.t() if stored.dim() == 2 else stored
    if rule.by_head:
        parts = len(rule.ours)
        stored = stored.view(-1, parts, head_dim, *stored.shape[1:])
        return [stored[:, i].reshape(shape) for i, shape in enumerate(shapes)]
    return list(stored.split([shape[0] for shape in shapes]))


def pack(rule: Rule, parameters: list[Any], head_dim: int) -> Any:
    """The stored tensor from its parameters: the inverse of `unpack`."""
    import torch

    if rule.by_head:
        split = [p.view(-1, head_dim, *p.shape[1:]) for p in parameters]
        joined = torch.stack(split, dim=1)
        return joined.reshape(math.prod(joined.shape[:3]), *joined.shape[3:])
    stored = torch.cat(parameters) if len(parameters) > 1 else parameters[0]
    return stored.t() if rule.transposed and stored.dim() == 2 else stored
