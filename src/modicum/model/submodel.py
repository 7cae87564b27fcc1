"""Smaller decoders within a decoder: some of its layers, the first key/value groups, the first MLP channels.

    sub = Submodel.of(model.config, layers=range(8), groups=2, channels=512)
    hidden(model, sub, tokens_BT)        # with the model's own weights: gradients go into it
    cut(model, sub)                      # a decoder of its own, for export and serving

A prefix is a good one where channels and groups are sorted: `sort_by_importance` reorders them and changes no output.
Shapes: B sequences, T tokens, D width, F MLP channels, G key/value groups.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder


@dataclass(frozen=True)
class Submodel:
    """layers: those that stay, ascending. groups, channels: of each of them, how many of the first ones stay."""

    layers: tuple[int, ...]
    groups: tuple[int, ...]
    channels: tuple[int, ...]

    @classmethod
    def of(
        cls, config: DecoderConfig, layers: Sequence[int] | None = None, groups: float = 1.0, mlp: float = 1.0
    ) -> Submodel:
        """Fractions of each layer's groups and channels, at least one of each. Raises `UserError` for a model whose
        parts cannot be taken out."""
        if any(layer.mixer != "softmax" or layer.qk_norm == "full" for layer in config.per_layer):
            raise UserError("sub-models are of softmax attention without norms over all heads; this model has another")
        kept = tuple(range(config.layers)) if layers is None else tuple(layers)
        shapes = [config.per_layer[i] for i in kept]
        return cls(
            kept,
            tuple(max(1, round(groups * s.kv_heads)) for s in shapes),
            tuple(max(1, round(mlp * s.mlp_width)) for s in shapes),
        )

    def config(self, of: DecoderConfig) -> DecoderConfig:
        """Its shape; of the family `modicum` where its layers come to differ."""
        overrides = []
        for i, groups, channels in zip(self.layers, self.groups, self.channels, strict=True):
            shape = of.per_layer[i]
            sizes = {"kv_heads": groups, "heads": groups * (shape.heads // shape.kv_heads), "mlp_width": channels}
            overrides.append(dict(of.overrides[i] if of.overrides else {}) | sizes)
        made = dataclasses.replace(of, layers=len(self.layers), overrides=tuple(overrides))
        return dataclasses.replace(made, family="modicum") if made.overrides and not of.overrides else made

    def whole(self, of: DecoderConfig) -> bool:
        return self == Submodel.of(of)


def sliced(model: Decoder, sub: Submodel) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the sub-model by its own names, as views of the model's."""
    for name, parameter in model.named_parameters():
        if not name.startswith("layers."):
            yield name, parameter
    for number, (i, groups, channels) in enumerate(zip(sub.layers, sub.groups, sub.channels, strict=True)):
        shape = model.config.per_layer[i]
        keys = groups * shape.head_dim
        queries = keys * (shape.heads // shape.kv_heads)
        rows = {"q": queries, "k": keys, "v": keys, "gate": channels, "up": channels}
        columns = {"o": queries, "down": channels}
        for name, whole in model.layers[i].named_parameters():
            view: Tensor = whole
            part = name.split(".")[1] if "." in name else ""
            if part in rows:
                view = view[: rows[part]]
            elif part in columns and view.dim() == 2:
                view = view[:, : columns[part]]
            yield f"layers.{number}.{name}", view


class _Hidden(nn.Module):
    """A decoder without data whose forward pass is `hidden`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        with torch.device("meta"):
            self.model = Decoder(config, init=False)

    def forward(self, tokens_BT: Tensor, **options: Any) -> Tensor:
        return self.model.hidden(tokens_BT, **options)


_SKELETONS: dict[tuple[Submodel, str], _Hidden] = {}


def _skeleton(sub: Submodel, of: DecoderConfig) -> _Hidden:
    key = sub, repr(of)
    if key not in _SKELETONS:
        if len(_SKELETONS) >= 64:
            _SKELETONS.clear()
        _SKELETONS[key] = _Hidden(sub.config(of))
    return _SKELETONS[key]


def hidden(model: Decoder, sub: Submodel, tokens_BT: Tensor, **options: Any) -> Tensor:
    """h_BTD of the sub-model after the shared final norm; `model.head` gives its logits. Options: `Decoder.hidden`."""
    weights = {f"model.{name}": tensor for name, tensor in sliced(model, sub)}
    call = functools.partial(torch.func.functional_call, tie_weights=False, strict=False)
    made: Tensor = call(_skeleton(sub, model.config), weights, (tokens_BT,), options)
    return made


@torch.no_grad()
def cut(model: Decoder, sub: Submodel) -> Decoder:
    """The sub-model as a decoder with weights of its own."""
    made = Decoder(sub.config(model.config), init=False)
    values = {name: tensor.detach().clone() for name, tensor in sliced(model, sub)}
    for name, parameter in list(made.named_parameters()):
        parameter.data = values[name]
    return made.train(model.training)


@torch.no_grad()
def without_zeros(model: Decoder) -> Decoder:
    """A decoder without the MLP channels and key/value groups whose weights are all zero, which computes the same.

    Raises `UserError` where there are none; at least one of each stays in a layer. Layers may come to differ.
    """
    channels, groups = [], []
    for layer, shape in zip(model.layers, model.config.per_layer, strict=True):
        mlp: Any = layer.get_submodule("mlp")
        attention: Any = layer.get_submodule("attention")
        used_F = mlp.down.weight.any(0) & (mlp.up.weight.any(1) | (mlp.up.bias is not None))
        used_G = attention.o.weight.any(0).unflatten(0, (shape.kv_heads, -1)).any(1)
        for used in (used_F, used_G):
            used[0] |= not bool(used.any())
        channels.append(used_F)
        groups.append(used_G)
        G, E = shape.kv_heads, shape.head_dim
        ins = [mlp.up, mlp.gate] if shape.gated else [mlp.up]
        _permute(ins, [mlp.down], (~used_F).int().argsort(stable=True), 1)
        order_G = (~used_G).int().argsort(stable=True)
        _permute([attention.k, attention.v], [], order_G, E)
        _permute([attention.q], [attention.o], order_G, E * (shape.heads // G))
    kept = tuple(int(u.sum()) for u in groups), tuple(int(u.sum()) for u in channels)
    sub = Submodel(tuple(range(model.config.layers)), *kept)
    if sub.whole(model.config):
        raise UserError(
            "no MLP channel and no key/value group of this model is all zeros: there is nothing to take out"
        )
    return cut(model, sub)


@torch.no_grad()
def sort_by_importance(model: Decoder) -> None:
    """Put the important channels and groups of each layer first; outputs stay as they are.

    channel c: ||down_c|| ||up_c|| (||gate_c||);   group j: the product of the norms of its q, k, v and o
    """
    for layer, shape in zip(model.layers, model.config.per_layer, strict=True):
        mlp: Any = layer.get_submodule("mlp")
        attention: Any = layer.get_submodule("attention")
        ins = [mlp.up, mlp.gate] if shape.gated else [mlp.up]
        score_F = mlp.down.weight.float().norm(dim=0)
        for part in ins:
            score_F = score_F * part.weight.float().norm(dim=1)
        _permute(ins, [mlp.down], score_F.argsort(descending=True, stable=True), 1)
        G, E = shape.kv_heads, shape.head_dim
        score_G = attention.o.weight.float().unflatten(1, (G, -1)).square().sum((0, 2))
        for part in (attention.q, attention.k, attention.v):
            score_G = score_G * part.weight.float().unflatten(0, (G, -1)).square().sum((1, 2))
        order_G = score_G.argsort(descending=True, stable=True)
        _permute([attention.k, attention.v], [], order_G, E)
        _permute([attention.q], [attention.o], order_G, E * (shape.heads // G))


def _permute(rows: Sequence[Any], columns: Sequence[Any], order: Tensor, size: int) -> None:
    """Blocks of `size` rows and columns in another order."""
    index = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
    for part in rows:
        part.weight.copy_(part.weight[index])
        if part.bias is not None:
            part.bias.copy_(part.bias[index])
    for part in columns:
        part.weight.copy_(part.weight[:, index])
