"""Store a model's forms: what they are as JSON (`describe`), what they hold as tensors (`form_state`).

A model folder keeps the first in `modicum.json` and the second in safetensors under module names
(`layers.0.attention.q.codes`); every other weight stays where its Hugging Face folder has it. Reading goes
`restore` (empty forms in place of plain layers), then `load_form_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import CorruptError
from modicum.model import attach
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear._adapter import Adapter

VERSION = 1


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Every form of `model` as JSON: method, knobs, shape, layout, base. None if there is no form."""
    embeddings = {
        id(module.form): name for name, module in model.named_modules() if isinstance(module, attach.FormEmbedding)
    }
    names_of: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(id(module), []).append(name)
    entries: dict[str, Any] = {}
    for name, form in attach.forms(model).items():
        entry = _entry(form)
        embedding = embeddings.get(id(form))
        if embedding is not None:
            entry["embedding"] = True
        name = embedding or name
        entry["tied"] = [p for p in names_of[id(form)] if p not in (name, f"{name}.form")]
        entries[name] = entry
    return {"version": VERSION, "forms": entries} if entries else None


def _entry(form: LinearForm) -> dict[str, Any]:
    if form.choice is None:
        raise ValueError(f"{form} was not made by attach, so how to make it again is not known")
    return {
        "form": form.choice.resolved(),
        "in": form.in_features,
        "out": form.out_features,
        "bias": form.bias_value() is not None,
        "dtype": str(form.dtype).removeprefix("torch."),
        "layout": form.layout(),
        "base": _entry(form.base) if isinstance(form, Adapter) else None,
    }


def restore(
    model: nn.Module,
    description: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, LinearForm]:
    """Put the described forms, still empty, where plain layers are; dtype None means that of each form.

    Raises `CorruptError` if they do not fit the model.
    """
    if description.get("version") != VERSION:
        raise CorruptError(
            f"the description of forms has version {description.get('version')!r}, this "
            f"modicum reads {VERSION}; write the folder again"
        )
    made: dict[str, LinearForm] = {}
    for name, entry in description["forms"].items():
        try:
            old = model.get_submodule(name)
            form = _form(entry, dtype, device)
            made[name] = form
            new = attach.FormEmbedding(form) if entry.get("embedding") else form
            weight = getattr(old, "weight", None)
            if weight is not None and weight.numel() != form.in_features * form.out_features:
                raise CorruptError(
                    f"module {name!r} holds {tuple(weight.shape)} values, its form "
                    f"{form.out_features} x {form.in_features}; the folder's files do not "
                    "belong together"
                )
            for target, module in [(name, new), *((tied, form) for tied in entry.get("tied", ()))]:
                parent, _, key = target.rpartition(".")
                setattr(model.get_submodule(parent), key, module)
            new.train(old.training)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptError(
                f"the form described for {name!r} cannot be made ({error}); write the folder again"
            ) from None
    for cls in dict.fromkeys(type(form) for form in made.values()):
        cls.after_attach(model, {name: form for name, form in made.items() if type(form) is cls})
    if any(isinstance(form, Adapter) for form in made.values()):
        attach.freeze(model)
    return made


def _form(entry: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str) -> LinearForm:
    shape = LinearShape(
        in_features=entry["in"],
        out_features=entry["out"],
        bias=entry["bias"],
        dtype=dtype or getattr(torch, entry["dtype"]),
        device=device,
    )
    choice = Choice.parse("linear", entry["form"])
    base = [] if entry["base"] is None else [_form(entry["base"], dtype, device)]
    form = registry.build("linear", choice, shape, *base)
    form.choice = choice
    form.set_layout(entry["layout"])
    form.requires_grad_(False)
    for parameter in form.trainable():
        parameter.requires_grad_(True)
    return form


def form_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of all forms by module name; a shared one comes under its first name."""
    prefixes = tuple(f"{name}." for name in attach.forms(model))
    values: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(prefixes) and id(tensor) not in seen:
            seen.add(id(tensor))
            values[name] = tensor
    return values


def load_form_state(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Fill the forms that `restore` made, floating weights in `dtype` (None: in their own).

    Raises `CorruptError` for a missing, unknown or misshapen tensor.
    """
    expected = form_state(model)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise CorruptError(
            f"the stored forms do not match their description: missing {missing[:3]}, unknown "
            f"{extra[:3]}; write the folder again"
        )
    formats = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, LinearForm)
        for key in module.stored
    }
    for name, target in expected.items():
        value = tensors[name]
        free = value.dtype.is_floating_point and target.dtype.is_floating_point and name not in formats
        if value.shape != target.shape or not (free or value.dtype == target.dtype):
            raise CorruptError(
                f"stored tensor {name!r} is {value.dtype} {tuple(value.shape)}, its form "
                f"wants {target.dtype} {tuple(target.shape)}; write the folder again"
            )
        target.data = value.to(target.device, (dtype or value.dtype) if free else value.dtype)
