"""swiftkv: softmax attention whose keys and values are made of an earlier layer's output.

    k_j, v_j = W_k,j N(x_l), W_v,j N(x_l)      q_j = W_q,j norm_j(x_j)       for every layer j > l, N one norm for all

So a prompt's tokens need layers 0 .. l only: x_l gives all later keys and values, and no more than the last token,
whose logits are wanted, goes on (`serve.backends.torch`). `convert` makes such a model of a plain one; the distiller
`swiftkv` trains it. Qiao et al. 2024, arXiv:2410.03960, section 3.2 (SingleInputKV). Departs: later layers
do not share a cache among each other (AcrossKV).

Shapes: B batch, T tokens, D width, G key/value heads, E head_dim.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.attend import Attend
from modicum.model.mixers import Rotation
from modicum.model.mixers.softmax import Softmax
from modicum.model.rope import rotate


class SwiftKv(Softmax):
    """`source_BTD`: N(x_l)."""

    def keys_values(self, source_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """k_BGTE, rotated, and v_BGTE."""
        k, v = self.k(source_BTD), self.v(source_BTD)
        if self.qk_norm == "full":
            k = self.k_norm(k)
        k_BGTE, v_BGTE = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (k, v))
        if self.qk_norm == "head":
            k_BGTE = self.k_norm(k_BGTE)
        return k_BGTE if rotation is None else rotate(k_BGTE, *rotation), v_BGTE

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, rotation: Rotation, attend: Attend, source_BTD: Tensor
    ) -> Tensor:
        q = self.q(x_BTD)
        if self.qk_norm == "full":
            q = self.q_norm(q)
        q_BHTE = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.qk_norm == "head":
            q_BHTE = self.q_norm(q_BHTE)
        if rotation is not None:
            q_BHTE = rotate(q_BHTE, *rotation)
        more = {} if self.pattern is None else {"pattern": self.pattern}
        how: dict[str, Any] = {"window": self.window, "scale": self.scale, "softcap": self.softcap} | more
        out_BHTE = attend(self.layer, q_BHTE, *self.keys_values(source_BTD, rotation), **how)
        return self.o(out_BHTE.transpose(1, 2).flatten(2))


def convert(model: Any, own: int) -> None:
    """Let a plain decoder's layers from `own` on make keys and values of layer `own` - 1's output, in place.

    Weights stay; N begins as the norm of layer `own`, so that its keys and values are what they were."""
    config = model.config
    if not 0 < own < config.layers:
        raise UserError(
            f"swiftkv: {own} of {config.layers} layers with keys of their own; it must be 1 to {config.layers - 1}"
        )
    if config.source_layer is not None or any(layer.mixer != "softmax" for layer in config.per_layer):
        raise UserError("swiftkv needs a decoder of softmax attention in every layer")
    before = config.overrides or ({},) * config.layers
    overrides = tuple(dict(o) | ({"mixer": "swiftkv"} if i >= own else {}) for i, o in enumerate(before))
    model.config = dataclasses.replace(config, overrides=overrides, family="modicum")
    for layer in model.layers[own:]:
        layer.attention.__class__ = SwiftKv  # the same modules under another forward pass
    model.kv_norm = copy.deepcopy(model.layers[own].attention_norm)
