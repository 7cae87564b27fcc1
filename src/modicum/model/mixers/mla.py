"""mla: attention over a latent vector, which is all of a token that the cache keeps beside one rotated key.

    c = norm(x W_c)     k_r = rotate(x W_r)     q_h = x W_q,h = [q_r,h, q_n,h]
    score_h = (q_r,h k_r + q_n,h W_uk,h c) / sqrt(d + p)
    out = o([W_uv,h (sum over tokens a_h c)  for every head h])

d: dimensions of a head's content, width / heads; p: rotated ones; r: of c. W_uk,h is applied to the query and W_uv,h to
the sum ("absorbed"), so attention is that of H queries over one key/value head of p + r dimensions, [k_r, c]. The
layer's `head_dim` is p + r, the fraction of its rope p / (p + r). (The cache keeps c twice, as key and as value.)

With `kv_heads` = n > 1 the latent is split for n devices, as `compressor/tpla` describes: head i has slice c_i of r/n
dimensions and k_r, every query head attends to each slice by itself, with `boost` on the slice's part of the score, and
the n results are summed. The norm of a slice is that of the slice alone, times `ratio`. `shard` takes one device's
part; devices add what they have before o.

DeepSeek-V2, arXiv:2405.04434, section 2.1; without its low-rank queries.
Shapes: B batch, T tokens, D width, N slices, H query heads, P rotated, C dimensions of a slice, R = N C latent, K
content.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.model.attend import Attend
from modicum.model.config import DecoderConfig, LayerConfig, Rope
from modicum.model.mixers import Mixer, Rotation
from modicum.model.rope import rotate


class Mla(Mixer):
    """`group`: the processes that hold the other slices, None for all slices here."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__(config, layer)
        c = config.per_layer[layer]
        H, N, K, P, C = sizes(c, config.width)
        self.heads, self.slices, self.content, self.rotated, self.eps = H, N, K, P, config.norm_eps
        self.group: Any = None
        self.q = nn.Linear(config.width, H * (P + K), bias=False)
        self.kv = nn.Linear(config.width, P + N * C, bias=False)
        self.norm = nn.Parameter(torch.ones(N * C))
        self.k_up = nn.Linear(N * C, H * K, bias=False)
        self.v_up = nn.Linear(N * C, H * K, bias=False)
        self.ratio = nn.Parameter(torch.ones(N), requires_grad=False)
        self.boost = nn.Parameter(torch.ones(N), requires_grad=False)
        self.o = nn.Linear(H * K, config.width, bias=False)

    def latent(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """k_r before its rotation, B1TP, and c_BNTC."""
        key_BTP, c_BTR = self.kv(x_BTD).split([self.rotated, self.norm.numel()], -1)
        c_BTNC = c_BTR.to(torch.promote_types(c_BTR.dtype, torch.float32)).unflatten(-1, (self.slices, -1))
        square_BTN1 = c_BTNC.square().mean(-1, keepdim=True) * self.ratio.to(c_BTNC.dtype)[:, None]
        c_BTNC = c_BTNC * torch.rsqrt(square_BTN1 + self.eps)
        c_BTNC = c_BTNC.to(x_BTD.dtype) * self.norm.view(self.slices, -1).to(x_BTD.dtype)
        return key_BTP[:, None], c_BTNC.transpose(1, 2)

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        H, N, K, P = self.heads, self.slices, self.content, self.rotated
        q_BHTX = self.q(x_BTD).unflatten(-1, (H, P + K)).transpose(1, 2)
        turned_BHTP, content_BHTK = q_BHTX.split([P, K], -1)
        key_B1TP, c_BNTC = self.latent(x_BTD)
        if rotation is not None:
            turned_BHTP, key_B1TP = rotate(turned_BHTP, *rotation), rotate(key_B1TP, *rotation)
        up = [_matrix(m, x_BTD.dtype).unflatten(0, (H, K)).unflatten(-1, (N, -1)) for m in (self.k_up, self.v_up)]
        q_BNHTC = (
            torch.einsum("bhtk,hknc->bnhtc", content_BHTK, up[0]) * self.boost.to(x_BTD.dtype)[:, None, None, None]
        )
        q_BNHTE = torch.cat([turned_BHTP[:, None].expand(-1, N, -1, -1, -1), q_BNHTC], -1)
        k_BNTE = torch.cat([key_B1TP.expand(-1, N, -1, -1), c_BNTC], -1)
        v_BNTE = torch.cat([torch.zeros_like(key_B1TP).expand(-1, N, -1, -1), c_BNTC], -1)
        how: dict[str, Any] = {"window": None, "scale": (P + K) ** -0.5, "softcap": None}
        out_BMTE = attend(self.layer, q_BNHTE.flatten(1, 2), k_BNTE, v_BNTE, **how)
        c_BNHTC = out_BMTE.unflatten(1, (N, H))[..., P:]
        y_BTX = torch.einsum("bnhtc,hknc->bthk", c_BNHTC, up[1]).flatten(2)
        if self.group is not None:
            torch.distributed.all_reduce(y_BTX, group=self.group)
        return self.o(y_BTX)

    @classmethod
    def matmul_weights(cls, layer: LayerConfig, width: int) -> int:
        H, N, K, P, C = sizes(layer, width)
        return width * (H * (P + K) + P + N * C + H * K) + 2 * H * K * N * C

    @classmethod
    def other_parameters(cls, layer: LayerConfig, width: int) -> int:
        _, N, _, _, C = sizes(layer, width)
        return N * C + 2 * N


def _matrix(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a layer that is multiplied with what attention has summed, not with a token."""
    if isinstance(module, nn.Linear):
        return module.weight.to(dtype)
    if not hasattr(module, "decode"):
        raise UserError(f"mixer mla: {type(module).__name__.lower()} on k_up or v_up; name other layers with targets")
    return module.decode(dtype)


def sizes(layer: LayerConfig, width: int) -> tuple[int, int, int, int, int]:
    """(H, N, K, P, C) of a layer. Raises `UserError` for a shape that is none of this mixer's."""
    H, N = layer.heads // layer.kv_heads, layer.kv_heads
    P = int(layer.head_dim * layer.rope.fraction) if layer.rope is not None else 0
    if width % H or P % 2 or layer.head_dim <= P:
        raise UserError(
            f"mixer mla: width {width} must be a multiple of {H} query heads, and of head_dim={layer.head_dim} an even "
            f"part be rotated, not all; {P} are"
        )
    return H, N, width // H, P, layer.head_dim - P


def shape(heads: int, latent: int, rotated: int, slices: int = 1, rope: Rope | None = None) -> dict[str, Any]:
    """Fields of a `DecoderConfig` with this mixer: `replace(config, family="modicum", **shape(8, 64, 16))`."""
    if latent % slices:
        raise UserError(f"a latent of {latent} dimensions is not split in {slices}")
    head_dim = rotated + latent // slices
    fraction = (rotated + 0.5) / head_dim  # of which the whole part is `rotated`, however it is rounded
    given = {"heads": heads * slices, "kv_heads": slices, "head_dim": head_dim, "mixer": "mla"}
    return given | {"rope": dataclasses.replace(rope or Rope(), fraction=fraction)}


def split(model: Any, slices: int) -> Any:
    """The same weights as a decoder whose latents are in `slices`. `ratio` and `boost` of each layer begin at 1."""
    from modicum.model.decoder import Decoder

    config = model.config
    layer = config.per_layer[0]
    H, N, _, P, C = sizes(layer, config.width)
    changed = shape(H, N * C, P, slices, layer.rope)
    with torch.device("meta"):
        made = Decoder(dataclasses.replace(config, **changed), init=False)
    for name, module in model.named_children():
        if name != "layers":
            setattr(made, name, module)
    for index, block in enumerate(model.layers):
        attention: Any = block.attention
        attention.slices = slices
        for name in ("ratio", "boost"):
            old = getattr(attention, name)
            setattr(attention, name, nn.Parameter(torch.ones(slices, dtype=old.dtype), requires_grad=False))
        made.layers[index] = block
    return made.train(model.training)


def shard(model: Any, rank: int, group: Any = None) -> Any:
    """What device `rank` holds of a split model: its slice of every latent, all else whole. `group`: who adds up."""
    config = model.config
    H, _, _, P, C = sizes(config.per_layer[0], config.width)
    part = slice(rank * C, (rank + 1) * C)
    made = split(copy.deepcopy(model), 1)
    made.config = dataclasses.replace(made.config, **shape(H, C, P, 1, config.per_layer[0].rope))
    for mine, whole in zip(made.layers, model.layers, strict=True):
        a: Any = mine.attention
        rows = torch.cat([torch.arange(P), P + torch.arange(part.start, part.stop)])
        linear = nn.Linear(config.width, P + C, bias=False, device="meta")
        linear.weight = nn.Parameter(a.kv.weight.detach()[rows].clone())
        a.kv, a.norm = linear, nn.Parameter(a.norm.detach()[part].clone())
        for up in (a.k_up, a.v_up):
            up.weight, up.in_features = nn.Parameter(up.weight.detach()[:, part].clone()), C
        for name in ("ratio", "boost"):
            value = getattr(whole.attention, name).detach()[rank : rank + 1].clone()
            setattr(a, name, nn.Parameter(value, requires_grad=False))
        a.group = group
    return made
