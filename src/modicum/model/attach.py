"""Put linear forms into a module, take them out, merge them, describe and restore them.

    attach(model, {"layers.*.attention.*": "lora:rank=8"})      # adapters: the rest is frozen
    attach(model, {"layers.*": "int4:group=64"})                # every linear below `layers`
    merge(model)                                                # back to plain layers, updates merged in
    detach(model)                                               # back to plain layers, adapters dropped

Any `nn.Module` will do; what counts as a linear layer is `nn.Linear`, the `Conv1D` of transformers' GPT-2,
and a form that is already there; embeddings are taken by `attach_embedding` alone. Patterns are globs over
full module names (`*` also matches dots). How forms are stored is in `model.form_state`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modicum.budget.trace import has_data
from modicum.core import compose, registry
from modicum.core.callback import Callback
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear._adapter import Adapter
from modicum.model.linear.dense import Config as DenseConfig
from modicum.model.linear.dense import Dense

HEADS = ("lm_head", "embed_out")  # what gives logits; forms go there only where they are told to


class FormEmbedding(nn.Module):
    """A token embedding whose table a form holds: tokens (...) to (..., D)."""

    def __init__(self, form: LinearForm):
        super().__init__()
        self.form = form

    def forward(self, tokens: Tensor) -> Tensor:
        return self.form.rows(tokens)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, recognised without importing transformers: a linear that stores weight_IO."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | LinearForm) or is_conv1d(module)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer and every outermost form in a linear layer's place, once, by module name."""
    by_name: dict[str, nn.Module] = {}
    seen: set[int] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if inside and name.startswith(inside):
            continue
        if _is_linear(module) and id(module) not in seen:
            seen.add(id(module))
            by_name[name] = module
        if isinstance(module, LinearForm | FormEmbedding):
            inside = (*inside, name + ".")
    return by_name


def forms(model: nn.Module) -> dict[str, LinearForm]:
    """Every outermost form of `model`, once, by module name: an adapter, not the base below it."""
    by_name: dict[str, LinearForm] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearForm) and not name.startswith(tuple(f"{outer}." for outer in by_name)):
            by_name[name] = module
    return by_name


def match(model: nn.Module, patterns: Iterable[str]) -> dict[str, str]:
    """Module name to the one pattern that names it. A pattern that names no linear layer is an error."""
    names = linears(model)
    chosen: dict[str, str] = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise UserError(_no_match(pattern, names))
        for name in hits:
            if name in chosen:
                raise UserError(
                    f"module {name!r} is matched by {chosen[name]!r} and by {pattern!r}; "
                    "make the patterns exclude each other"
                )
            chosen[name] = pattern
    return chosen


def _no_match(pattern: str, names: Iterable[str]) -> str:
    names = list(names)
    ends = {name.rsplit(".", 1)[-1] for name in names}
    if pattern in ends:
        return f"pattern {pattern!r} matches no linear layer; a pattern is over the full name: type '*.{pattern}'"
    shapes = list(
        dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    )
    near = difflib.get_close_matches(pattern, shapes + names, n=3, cutoff=0.3)
    shown = ", ".join(shapes[:12]) + (", ..." if len(shapes) > 12 else "")
    return (
        f"pattern {pattern!r} matches no linear layer."
        + (f" Near: {', '.join(near)}." if near else "")
        + f" Linear layers here: {shown or '(none)'}"
    )


def attach(
    model: nn.Module,
    choices: Mapping[str, Any],
    *,
    calibration: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, LinearForm]:
    """Replace the linear layers that the patterns name by forms, fitted to their weights.

    choices: pattern to a form (`"lora:rank=8"`, a mapping or a `Choice`); the patterns may not overlap.
    calibration: module name to sample inputs_NI, for forms that use them.

    An adapter keeps the layer, or the form that is there, as its frozen base; attaching one leaves nothing
    but the forms' `trainable()` parameters requiring gradients. Returns the new forms by module name.
    Raises `UserError` for a pattern that matches nothing, overlapping patterns, a second form where the
    first does not support it, and knobs that do not fit the matrix; the model is then unchanged.
    """
    parsed = {pattern: Choice.parse("linear", choice) for pattern, choice in choices.items()}
    chosen = match(model, parsed)
    layers = linears(model)
    made: dict[str, LinearForm] = {}
    for name, pattern in chosen.items():
        try:
            made[name] = _make(layers[name], parsed[pattern], (calibration or {}).get(name), generator)
        except UserError as error:
            raise UserError(f"module {name!r}: {error}") from None
    for name, form in made.items():
        _replace(model, layers[name], form)
        form.train(layers[name].training)
    _notify(model, made)
    if any(isinstance(form, Adapter) for form in forms(model).values()):
        freeze(model)
    return made


def _make(
    layer: nn.Module, choice: Choice, calibration_NI: Tensor | None, generator: torch.Generator | None
) -> LinearForm:
    adapter = issubclass(_class(choice), Adapter)
    there = layer if isinstance(layer, LinearForm) else None
    if there is not None and not (adapter and "adapter_base" in there.provides):
        form_name = there.choice.method if there.choice else type(there).__name__
        raise UserError(
            f"holds the form {form_name!r} already and {choice.method!r} cannot go on top of it; merge or detach it "
            "first"
        )
    base = (there or wrap(layer)) if adapter else None
    weight_OI, bias_O = (base.dense(), base.bias_value()) if base is not None else plain(layer)
    if has_data(weight_OI) and not bool(weight_OI.isfinite().all()):
        raise UserError(f"its weight holds NaN or infinite values; {choice.method!r} cannot be fitted to it")
    shape = LinearShape.of(weight_OI, bias_O)
    form = _class(choice)(choice.config(), shape, *([] if base is None else [base]))
    form.choice, form.transposed = choice, is_conv1d(layer) or getattr(there, "transposed", False)
    return form.fit(weight_OI, bias_O, calibration_NI=calibration_NI, generator=generator)


def require_fit(choice: Any) -> None:
    """Raise `UserError` for a form that starts afresh: put into a trained model, it would forget weights."""
    remedy = f"train with it from the start: modicum pretrain CURATED --form {choice} --out RUN"
    trained = compose.setting("a trained model", requires={"fit"}, remedy=remedy)
    compose.resolve([compose.member("linear", choice), trained])


def _class(choice: Choice) -> type[LinearForm]:
    return registry.load("linear", choice.method, LinearForm).cls


def plain_shape(layer: nn.Module) -> tuple[int, int]:
    """(O, I) of a plain linear layer or a form."""
    if isinstance(layer, LinearForm):
        return layer.out_features, layer.in_features
    weight, _ = plain(layer)
    return weight.shape[0], weight.shape[1]


def plain(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight_OI, bias_O) of a plain linear layer."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return (weight.T if is_conv1d(layer) else weight), bias


def wrap(layer: nn.Module) -> LinearForm:
    """A plain layer as a `dense` form that shares its parameters (a Conv1D's are transposed, so copied)."""
    weight_OI, bias_O = plain(layer)
    form = Dense(DenseConfig(), LinearShape.of(weight_OI, bias_O, device="meta"))
    form.choice = Choice("linear", "dense")
    conv = is_conv1d(layer)
    form.weight = nn.Parameter(weight_OI.detach().contiguous()) if conv else layer.weight  # type: ignore[assignment]
    form.bias = bias_O  # type: ignore[assignment]
    form._like = weight_OI.detach().new_empty(0)
    return form


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Everywhere `old` is a child, also under a second name (shared modules stay shared)."""
    replaced, inside = False, set(new.modules())  # an adapter keeps the old form as its base
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if child is old and parent not in inside:
                setattr(parent, key, new)
                replaced = True
    if not replaced:
        raise UserError(
            "a form cannot replace the model itself; put the layer into a module, for instance nn.Sequential(layer)"
        )


def _notify(model: nn.Module, made: Mapping[str, LinearForm]) -> None:
    """`after_attach` of each class among `made`, with all of that class's forms in the model."""
    present = forms(model)
    for cls in dict.fromkeys(type(form) for form in made.values()):
        cls.after_attach(model, {name: form for name, form in present.items() if type(form) is cls})


def callbacks(model: nn.Module) -> dict[str, Callback]:
    """What the forms of `model` do in the training loop, by `linear.KEY`: one callback per method that has any."""
    present, owners = forms(model), {}
    for cls in dict.fromkeys(type(form) for form in present.values()):
        mine = {name: form for name, form in present.items() if type(form) is cls}
        if (callback := cls.callback(mine)) is not None:
            choice = next(iter(mine.values())).choice
            owners[f"linear.{choice.method if choice else cls.__name__}"] = callback
    return owners


def freeze(model: nn.Module) -> list[nn.Parameter]:
    """Only the forms' `trainable()` parameters require gradients from now on; returns those, each once."""
    model.requires_grad_(False)
    kept = list(dict.fromkeys(p for form in forms(model).values() for p in form.trainable()))
    for parameter in kept:
        parameter.requires_grad_(True)
    return kept


def settle(model: nn.Module) -> dict[str, LinearForm]:
    """Training is over: every form gives way to what it asks to be kept as. Returns the forms now there."""
    for form in forms(model).values():
        kept = form.settled() if isinstance(form, Adapter) else form
        if kept is not form:
            kept.transposed = form.transposed
            _replace(model, form, kept.train(form.training))
    return forms(model)


def target_modules(model: nn.Module, choice: Any) -> list[str]:
    """The linear layers of `model` that the paper of a form puts it into, by its patterns; heads are left alone.

    Raises `UserError` where there is none.
    """
    picked = Choice.parse("linear", choice)
    cls = _class(picked)
    names = [name for name in linears(model) if not name.endswith(HEADS)]
    matched = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in cls.target_modules)]
    if not matched:
        raise UserError(
            f"the form {picked.method!r} goes into {', '.join(cls.target_modules)}, which this model has not; "
            "name its layers yourself"
        )
    return matched


def detach(model: nn.Module) -> list[str]:
    """Take every adapter off, leaving its base; a plain base becomes a plain layer again. Names changed."""
    changed = []
    for name, form in forms(model).items():
        kept = form
        while isinstance(kept, Adapter):
            kept = kept.base
        if kept is not form or _is_dense(form):
            _replace(model, form, as_linear(kept) if _is_dense(kept) else kept)
            changed.append(name)
    _plain_embeddings(model)
    model.requires_grad_(True)
    return changed


def merge(model: nn.Module) -> list[str]:
    """Replace every form by a plain `nn.Linear` (or `nn.Embedding`) holding its `dense()`. Names changed."""
    present = forms(model)
    for name, form in present.items():
        if "merge" not in form.provides:
            raise UserError(
                f"module {name!r}: the form {form.choice or type(form).__name__} is not "
                "linear and cannot be merged into a weight; keep it, or detach it"
            )
    for form in present.values():
        _replace(model, form, as_linear(form))
    _plain_embeddings(model)
    model.requires_grad_(True)
    return list(present)


def _is_dense(form: LinearForm) -> bool:
    return isinstance(form, Dense)


def as_linear(form: LinearForm) -> nn.Linear:
    """An `nn.Linear` with the form's weight: a dense form's own parameters, else a copy."""
    linear = nn.Linear(form.in_features, form.out_features, bias=False, device="meta")
    weight, bias = form.dense(), form.bias_value()
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach().clone())
    linear.bias = bias  # type: ignore[assignment]   # None where there is none
    return linear.train(form.training)


def attach_embedding(model: nn.Module, name: str, choice: Any) -> LinearForm:
    """Let a form hold the token embedding `name`; a linear head tied to it shares the form."""
    picked = Choice.parse("linear", choice)
    table = dict(model.named_modules()).get(name)
    if not isinstance(table, nn.Embedding):
        near = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        raise UserError(
            f"module {name!r} is no token embedding that a form can take; embeddings here: "
            f"{', '.join(near) or '(none)'}"
        )
    if "embedding" not in _class(picked).provides or issubclass(_class(picked), Adapter):
        raise UserError(f"the form {picked.method!r} cannot hold an embedding; choose one that can, for instance int8")
    form = _make(table, picked, None, None)
    for layer in linears(model).values():
        if getattr(layer, "weight", None) is table.weight:
            if getattr(layer, "bias", None) is not None:
                raise UserError(f"the head tied to {name!r} has a bias, which a shared form cannot hold")
            _replace(model, layer, form)
    _replace(model, table, FormEmbedding(form))
    _notify(model, {name: form})
    return form


def _plain_embeddings(model: nn.Module) -> None:
    """After `merge` or `detach`: an embedding whose form is a plain linear now becomes an `nn.Embedding`."""
    for module in list(model.modules()):
        if isinstance(module, FormEmbedding) and isinstance(module.form, nn.Linear):
            weight = module.form.weight
            table = nn.Embedding(*weight.shape, _weight=weight)
            table.weight = weight
            _replace(model, module, table)
