"""Adapters as the `peft` library stores them: adapter_config.json and adapter_model.safetensors.

`peft` names modules as the Hugging Face model does, so names go through the model family's table. A
module that a family stores fused (Phi-3's and GPT-2's query, key and value) has one adapter there and
several here. Written, their factors are joined: A one below the other, B in blocks, which is the same
function at the sum of the ranks. When read, each part gets its own rows of B and the ranks that are not zero
there, so parts are restored as they were written.

Shapes: R rank, I in_features, O out_features.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.choice import Choice
from modicum.core.errors import CorruptError, UserError
from modicum.core.files import atomic_directory, read_json, write_json
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.families import Rule, expand, pack, unpack
from modicum.model.linear import LinearForm
from modicum.model.linear._adapter import Adapter
from modicum.model.safetensor import SafetensorsFile, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(.+)\.(lora_[AB])(?:\.default)?\.weight$")
# Options of peft that this adapter's equation does not cover.
REFUSED = (
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "use_qalora",
    "alora_invocation_tokens",
    "corda_config",
)


@dataclass(frozen=True)
class _PeftModule:
    """A module of peft's naming: its name, and how its matrix is split into the layers `ours`."""

    module: str
    ours: tuple[str, ...]
    rule: Rule
    fan_in_fan_out: bool


def _peft_modules(model: nn.Module) -> dict[str, _PeftModule]:
    """`PeftModule` by peft's module name, for every linear layer of a `Decoder` or a transformers model."""
    layers = attach.linears(model)
    if not isinstance(model, Decoder):
        return {
            name: _PeftModule(
                name, (name,), Rule(name, (name,)), attach.is_conv1d(layer) or getattr(layer, "transposed", False)
            )
            for name, layer in layers.items()
        }
    peft_modules = {}
    names = {name for name, _ in model.named_parameters()} | {f"{name}.weight" for name in layers}
    for stored, rule in expand(model.config, names).items():
        ours = tuple(name.removesuffix(".weight") for name in rule.ours)
        if stored.endswith(".weight") and all(name in layers for name in ours):
            module = stored.removesuffix(".weight")
            flat = dataclasses.replace(rule, transposed=False)
            peft_modules[module] = _PeftModule(module, ours, flat, rule.transposed)
    return peft_modules


def save_peft(model: nn.Module, folder: str | Path, base_model: str | None = None) -> Path:
    """Write the model's adapters as a folder that `peft.PeftModel.from_pretrained` loads.

    base_model: path or hub id of the model that they belong to, recorded in the config.
    Raises `UserError` if there is no adapter or one that is no low-rank update.
    """
    adapters = {name: form for name, form in attach.forms(model).items() if isinstance(form, Adapter)}
    if not adapters:
        raise UserError("the model has no adapter to save; attach one first, for instance lora:rank=8")
    factors = {}
    for name, form in adapters.items():
        low_rank = form.low_rank()
        if low_rank is None:
            raise UserError(
                f"module {name!r}: the form {form.choice} is not a low-rank update, which is all "
                "that PEFT's LoRA format can store; save the model folder instead"
            )
        factors[name] = low_rank
    head_dim = model.config.head_dim if isinstance(model, Decoder) else 0
    layers = attach.linears(model)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    transposed = set()
    for peft_module in _peft_modules(model).values():
        if not any(name in factors for name in peft_module.ours):
            continue
        a_RI, b_OR, scaling = _join(peft_module, factors, layers, head_dim)
        tensors[f"base_model.model.{peft_module.module}.lora_A.weight"] = a_RI.detach().contiguous()
        tensors[f"base_model.model.{peft_module.module}.lora_B.weight"] = b_OR.detach().contiguous()
        ranks[peft_module.module], alphas[peft_module.module] = len(a_RI), scaling * len(a_RI)
        transposed.add(peft_module.fan_in_fan_out)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dropout = max(float(getattr(form.config, "dropout", 0.0)) for form in adapters.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": dropout,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed == {True},
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): _plain(a) for m, a in alphas.items() if a != alpha},
    }
    with atomic_directory(folder) as new:
        write_json(new / CONFIG, config)
        write_safetensors(
            new / WEIGHTS,
            [(name, tuple(t.shape), t.dtype, partial(tensors.__getitem__, name)) for name, t in tensors.items()],
        )
    return Path(folder)


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _join(
    peft_module: _PeftModule,
    factors: Mapping[str, tuple[Tensor, Tensor, float]],
    layers: Mapping[str, nn.Module],
    head_dim: int,
) -> tuple[Tensor, Tensor, float]:
    """(A, B, scaling) of peft's module: ours itself, or all parts of a fused one as blocks."""
    if len(peft_module.ours) == 1:
        return factors[peft_module.ours[0]]
    scalings = {factors[name][2] for name in peft_module.ours if name in factors}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    total = sum(len(factors[name][0]) for name in peft_module.ours if name in factors)
    blocks, start = [], 0
    example = next(factors[name][1] for name in peft_module.ours if name in factors)
    for name in peft_module.ours:
        block = example.new_zeros(attach.plain_shape(layers[name])[0], total)
        if name in factors:
            a_RI, b_OR, own_scaling = factors[name]
            block[:, start : start + len(a_RI)] = b_OR * (own_scaling / scaling)
            start += len(a_RI)
        blocks.append(block)
    joined = torch.cat([factors[name][0] for name in peft_module.ours if name in factors])
    return joined, pack(peft_module.rule, blocks, head_dim), scaling


def load_peft(model: nn.Module, folder: str | Path) -> dict[str, LinearForm]:
    """Attach the adapters of a peft folder to `model`; returns the forms by module name, frozen base below.

    Raises `UserError` for what is not plain LoRA or does not fit the model, `CorruptError` for damaged files.
    """
    folder = Path(folder)
    config = _read_config(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    with SafetensorsFile(folder / WEIGHTS) as file:
        for key in file.names:
            match = _KEY.match(key)
            if match is None:
                raise UserError(
                    f"{folder / WEIGHTS}: {key!r} is not a LoRA factor of a linear layer; only those are read"
                )
            pairs.setdefault(match[1], {})[match[2]] = file.read(key)
    peft_modules = _peft_modules(model)
    head_dim = model.config.head_dim if isinstance(model, Decoder) else 0
    choices: dict[str, Choice] = {}
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for module, pair in pairs.items():
        if module not in peft_modules:
            origin = config.get("base_model_name_or_path") or "not named in its config"
            raise UserError(
                f"the adapter is for a module {module!r} that this model does not have; give the "
                f"model it was trained on ({origin})"
            )
        if pair.keys() != {"lora_A", "lora_B"} or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise CorruptError(f"{folder / WEIGHTS}: the factors of {module!r} do not belong together; fetch it again")
        a_RI, b_OR = pair["lora_A"], pair["lora_B"]
        peft_module = peft_modules[module]
        shapes = [attach.plain_shape(attach.linears(model)[name]) for name in peft_module.ours]
        if a_RI.shape[1] != shapes[0][1] or len(b_OR) != sum(shape[0] for shape in shapes):
            raise UserError(
                f"the adapter of {module!r} is for a {len(b_OR)} x {a_RI.shape[1]} matrix, this "
                f"model's is {sum(shape[0] for shape in shapes)} x {shapes[0][1]}; give the one "
                "that it was trained on"
            )
        alpha = float(_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
        knobs = {
            "alpha": alpha,
            "dropout": float(config.get("lora_dropout") or 0.0),
            "rslora": bool(config.get("use_rslora")),
        }
        parts = unpack(peft_module.rule, b_OR, [(shape[0], len(a_RI)) for shape in shapes], head_dim)
        for name, part in zip(peft_module.ours, parts, strict=True):
            used_R = part.any(0) if len(parts) > 1 and b_OR.any() else torch.ones(len(a_RI), dtype=torch.bool)
            if used_R.any():
                choices[name] = Choice("linear", "lora", _at_rank(knobs, int(used_R.sum()), len(a_RI)))
                values[name] = a_RI[used_R], part[:, used_R]
    made = attach.attach(model, choices)
    for name, form in made.items():
        for target, value in zip(form.trainable(), values[name], strict=True):
            target.data = value.to(target.device)  # in the adapter's own precision, whatever the model's
    return made


def _at_rank(knobs: dict[str, Any], rank: int, stored: int) -> dict[str, Any]:
    """Knobs of a factor pair of `rank` that scale it as `knobs` scale one of rank `stored`."""
    ratio = rank / stored
    return {**knobs, "rank": rank, "alpha": knobs["alpha"] * (ratio**0.5 if knobs["rslora"] else ratio)}


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CorruptError(
                f"{CONFIG} has the pattern {pattern!r}, which is no regular expression ({error}); fetch it again"
            ) from None
    return default


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}; give a folder that peft or modicum adapt wrote")
    if not (folder / WEIGHTS).is_file():
        pickle_note = (
            "adapter_model.bin, a pickle, which can run code when opened"
            if (folder / "adapter_model.bin").is_file()
            else "none"
        )
        raise UserError(f"{folder} has no {WEIGHTS} (it has {pickle_note}); save it with safe_serialization=True")
    try:
        config = read_json(folder / CONFIG)
        kind = config["peft_type"]
        float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{folder / CONFIG} is not an adapter's configuration ({error!r}); fetch it again") from None
    if kind != "LORA":
        raise UserError(f"{folder} holds a {kind} adapter; LORA is read")
    for key in REFUSED:
        if config.get(key) not in (None, False, "none", [], {}):
            raise UserError(
                f"{folder / CONFIG} has {key}={config[key]!r}, which plain LoRA cannot express; "
                "train the adapter without it, or merge it with peft"
            )
    return config
