"""One decoder for all families: tokens to logits.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modicum.model import sublayers
from modicum.model.attend import Attend, DenseAttend, default_positions
from modicum.model.config import DecoderConfig, Rope
from modicum.model.layers import Block
from modicum.model.mixers import Rotation
from modicum.model.norms import RMSNorm, make_norm
from modicum.model.rope import RopeTable
from modicum.model.wide import widened


class Decoder(nn.Module):
    """A decoder-only transformer as its config describes it. Made with fresh weights (see `init_weights`).

    `checkpoint_layers = True` recomputes each layer in the backward pass instead of keeping its
    activations. There is no dropout: pretraining passes over its data about once. `init=False` leaves the
    weights as allocated, for a caller that fills or only counts them.
    """

    def __init__(self, config: DecoderConfig, generator: torch.Generator | None = None, *, init: bool = True):
        super().__init__()
        self.config = config
        self.checkpoint_layers = False
        embed_width = config.embed_width or config.width
        self.embed = _embedding(config.vocab_size, embed_width)
        if config.position == "learned":
            self.positions = _embedding(config.context_length + config.position_offset, config.width)
        if embed_width != config.width:
            self.embed_in = nn.Linear(embed_width, config.width, bias=False)
            self.embed_out = nn.Linear(config.width, embed_width, bias=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = make_norm(config) if config.final_norm else nn.Identity()
        self.lm_head = nn.Linear(embed_width, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight
        if config.source_layer is not None:
            self.kv_norm = make_norm(config)
        self._ropes: list[RopeTable] = []  # layers that rotate alike share a table
        self._rope_index: list[int | None] = []
        kinds: list[tuple[Rope, int]] = []
        for layer in config.per_layer:
            kind = None if layer.rope is None else (layer.rope, layer.head_dim)
            if kind is not None and kind not in kinds:
                kinds.append(kind)
                with torch.device("cpu"):
                    self._ropes.append(RopeTable(*kind, config.context_length))
            self._rope_index.append(None if kind is None else kinds.index(kind))
        if init and not self.embed.weight.is_meta:
            self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, std: float | None = None) -> None:
        """Fresh weights: normal truncated at 3 std, biases 0, norms 1.

        std defaults to sqrt(2 / (5 * width)) (Nguyen & Salazar 2019, arXiv:1910.05895), which is 0.02 at
        width 1024 and larger below; what is added to the residual stream (attention.o, mlp.down) is divided
        by sqrt(2 * layers), so that the stream does not grow with depth (Radford et al. 2019, GPT-2).
        """
        std = math.sqrt(2 / (5 * self.config.width)) if std is None else std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                if name == "lm_head" and self.config.tied:
                    continue
                scale = (2 * self.config.layers) ** -0.5 if name.endswith((".o", ".down")) else 1.0
                fresh = torch.empty(module.weight.shape, dtype=torch.float32, device=module.weight.device)
                nn.init.trunc_normal_(fresh, 0.0, std * scale, -3 * std * scale, 3 * std * scale, generator=generator)
                module.weight.copy_(fresh)
            elif isinstance(module, nn.LayerNorm | RMSNorm):
                module.weight.fill_(0.0 if getattr(module, "plus_one", False) else 1.0)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                bias.zero_()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """logits_BTV in the model's dtype. Arguments as in `hidden`."""
        return self.head(
            self.hidden(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT, mask_BT=mask_BT, attend=attend)
        )

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """h_BTD after the final norm (and the output projection, where a family has one).

        `documents_BT`: integers; tokens attend within equal numbers only. `mask_BT`: True for real tokens.
        `positions_BT` default to counting real tokens from 0 in each document. `attend` replaces the default
        causal attention (a cache, a serving engine, a pattern) and then alone decides what is seen.
        """
        if positions_BT is None:
            ask = getattr(attend, "next_positions", None)
            positions_BT = ask(tokens_BT) if ask else default_positions(tokens_BT, documents_BT, mask_BT)
        if attend is None:
            attend = DenseAttend(documents_BT, mask_BT)
        x_BTD = self.embedded(tokens_BT, positions_BT)
        x_BTD, _ = self.run_layers(x_BTD, self.rotations(positions_BT, x_BTD.dtype), attend)
        return self.normed(x_BTD)

    def embedded(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """x_BTD that the first layer is given."""
        x_BTD = self.embed(tokens_BT)
        if self.config.embed_scale is not None:
            x_BTD = x_BTD * torch.tensor(self.config.embed_scale, dtype=x_BTD.dtype)
        if self.config.embed_width not in (None, self.config.width):
            x_BTD = self.embed_in(x_BTD)
        if self.config.position == "learned":
            x_BTD = x_BTD + self.positions(positions_BT + self.config.position_offset)
        return x_BTD

    def rotations(self, positions_BT: Tensor, dtype: torch.dtype) -> list[Rotation]:
        """cos and sin of each layer at these positions; layers that rotate alike have the same tensors."""
        made = [table(positions_BT, dtype) for table in self._ropes]
        return [None if index is None else made[index] for index in self._rope_index]

    def run_layers(
        self,
        x_BTD: Tensor,
        rotations: list[Rotation],
        attend: Attend,
        first: int = 0,
        last: int | None = None,
        source_BTD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Through the layers `first` .. `last` - 1: what comes out, and what later layers make their keys and values
        of, where the config has a `source_layer` that has been passed."""
        for index in range(first, len(self.layers) if last is None else last):
            layer = self.layers[index]
            more = (source_BTD,) if self.config.per_layer[index].mixer == "swiftkv" else ()
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x_BTD = checkpoint(layer, x_BTD, rotations[index], attend, *more, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, rotations[index], attend, *more)
            if index == self.config.source_layer:
                source_BTD = self.kv_norm(x_BTD)
        return x_BTD, source_BTD

    def normed(self, x_BTD: Tensor) -> Tensor:
        """h_BTD of what the last layer gave."""
        x_BTD = self.norm(x_BTD)
        if self.config.embed_width not in (None, self.config.width):
            x_BTD = self.embed_out(x_BTD)
        return x_BTD

    def head(self, h_BTD: Tensor) -> Tensor:
        """Logits of hidden states, with the family's softcap; any leading shape, so a loss may be chunked."""
        with widened(h_BTD):
            logits = sublayers.projected(self.lm_head, h_BTD)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def ropes(self) -> tuple[list[RopeTable], list[int | None]]:
        """The rotary tables, and which of them each layer uses; None where a layer does not rotate."""
        return list(self._ropes), list(self._rope_index)

    def rope_tables(self) -> list[RopeTable | None]:
        """The rotary table of each layer; None where a layer does not rotate."""
        return [None if index is None else self._ropes[index] for index in self._rope_index]

    @property
    def device(self) -> torch.device:
        return self._first().device

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    def _first(self) -> Tensor:
        """The embedding, or where a form holds it another weight that stays in the model's dtype."""
        weight = getattr(self.embed, "weight", None)
        if isinstance(weight, Tensor):
            return weight
        return next(p for p in self.parameters() if p.is_floating_point())


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Not yet filled. Left to itself the module draws normal numbers, on `meta` by code that imports torch._dynamo."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))
