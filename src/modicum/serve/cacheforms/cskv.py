"""cskv: keys and values of all heads of a layer on fewer channels, the latest tokens as they are.

    code = k V_r,   k' = code V_r^T,   V_r the first r columns of an orthogonal (C, C) matrix of the layer, C = G E

of keys *before* their rotary embedding, which are rotated to their own positions after decoding; values the same
without rotation. The last tokens that fill no block yet, and `residual` before them, are kept whole, and a prompt that
is computed at once attends to itself in full (`serve.recent`). With residual=0 and blocks of 32 tokens that is the
paper's window. Fitted on text, the matrix is one of

    asvd:  right singular vectors of diag(mean |x| + 1e-6)^0.5 W^T      W_k or W_v, x its inputs; the paper's start
    pca:   eigenvectors of E k k^T                                      of least E ||k' - k||^2

Wang et al. 2024, arXiv:2409.10593, sections 3.1 to 3.3. Departs: the paper trains x -> x A B from `asvd` on
E ||x A B - k||^2 with W_k frozen; k is linear in x, so that loss has its minimum at `pca` (Eckart and Young), which is
taken instead. bits=4 codes the channels as kivi does: keys per channel over a block, values per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.serve.cacheforms import kivi
from modicum.serve.cacheforms._fitted import FittedForm, Rotations, Seen, batches, check_shape, principal


@dataclass(frozen=True, kw_only=True)
class Config:
    fit: str = ""  # file that `modicum fit` wrote
    keys: Annotated[float, Field(gt=0, le=1)] = 0.5  # channels of a layer's keys that are kept, as a fraction
    values: Annotated[float, Field(gt=0, le=1)] = 0.5
    residual: Annotated[int, Field(ge=0)] = 16  # latest tokens that are kept as they are, at least
    bits: Literal[4, 16] = 16  # of a channel; 16: the cache's dtype
    start: Literal["pca", "asvd"] = "pca"  # when fitted: whose directions


TOY = Config(keys=0.75, values=0.75, residual=8)
CLAIM = {
    "figure": "80% less memory of the cache with long-context ability kept, 95% with 4 bits",
    "where": "abstract",
    "scale": "longchat-7b-v1.5-32k, Mistral-7B",
}
SWEEP = ("keys=0.5,values=0.5", "keys=0.25,values=0.5")


class Cskv(FittedForm):
    config: Config
    conflicts = frozenset({"eviction", "speculative_decoding"})
    rowwise = False

    def __init__(self, config: Config, head_dim: int, dtype: torch.dtype):
        super().__init__(config, head_dim, dtype)
        self.residual = config.residual

    @classmethod
    @torch.no_grad()
    def fit(cls, config: Config, model: Decoder, tokens_NT: Tensor) -> dict[str, Tensor]:
        check_shape("cskv", model.config)
        if config.start == "asvd":
            return _asvd(model, tokens_NT)
        shape, rotations = model.config, Rotations("cskv", model.config)
        C = shape.kv_heads * shape.head_dim
        moments = {which: torch.zeros(shape.layers, C, C, dtype=torch.float64) for which in "kv"}

        def add(layer: int, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> None:
            at_BT = torch.arange(k_BGTE.shape[2]).expand(len(k_BGTE), -1)
            plain_GBTE = rotations.turn(layer, k_BGTE.transpose(0, 1), at_BT, back=True)
            for which, x_GBTE in (("k", plain_GBTE), ("v", v_BGTE.transpose(0, 1))):
                rows_RC = _joined(x_GBTE).flatten(0, 1).double()
                moments[which][layer] += (rows_RC.T @ rows_RC).cpu()

        for tokens_BT in batches(tokens_NT):
            model.hidden(tokens_BT.to(model.device), attend=Seen(add))
        return {f"{which}_LCC": principal(moments[which]).float() for which in "kv"}

    def load(self, fit: dict[str, Tensor], shape: DecoderConfig) -> None:
        C = shape.kv_heads * shape.head_dim
        self.rotations = Rotations("cskv", shape)
        kept = {"k": max(1, round(self.config.keys * C)), "v": max(1, round(self.config.values * C))}
        if self.config.bits == 4:
            kept = {which: -(-n // 8) * 8 for which, n in kept.items()}  # groups of 8 channels share a byte's scale
            self.coders = {n: kivi.Kivi(kivi.Config(bits=4, group=_group(n)), n, torch.float32) for n in kept.values()}
        self.bases = {which: fit[f"{which}_LCC"][:, :, : kept[which]].contiguous() for which in "kv"}

    def encode_layer(self, which: str, layer: int, x_GNPE: Tensor, at_NP: Tensor) -> tuple[Tensor, ...]:
        if which == "k":
            x_GNPE = self.rotations.turn(layer, x_GNPE, at_NP, back=True)
        basis_CR = self.bases[which][layer].to(x_GNPE.device)
        code_NPR = _joined(x_GNPE).float() @ basis_CR
        if self.config.bits == 16:
            return (code_NPR.to(self.dtype),)
        return self.coders[basis_CR.shape[1]].encode(which, code_NPR)

    def decode_layer(self, which: str, layer: int, codes: tuple[Tensor, ...], at_NP: Tensor) -> Tensor:
        basis_CR = self.bases[which][layer].to(codes[0].device)
        coder = None if self.config.bits == 16 else self.coders[basis_CR.shape[1]]
        code_NPR = codes[0] if coder is None else coder.decode(which, codes)
        x_GNPE = (code_NPR.float() @ basis_CR.T).unflatten(-1, (-1, self.head_dim)).permute(2, 0, 1, 3)
        if which == "k":
            x_GNPE = self.rotations.turn(layer, x_GNPE, at_NP)
        return x_GNPE.to(self.dtype)


def _joined(x_GNPE: Tensor) -> Tensor:
    """The heads of each entry side by side, (N, P, C)."""
    return x_GNPE.permute(1, 2, 0, 3).flatten(2)


def _group(channels: int) -> int:
    return next(g for g in (32, 16, 8) if channels % g == 0)


def _asvd(model: Decoder, tokens_NT: Tensor) -> dict[str, Tensor]:
    """Activation-aware singular vectors: eigenvectors of W diag(mean |x|) W^T, alike for keys and values."""
    sums: list[Any] = [0.0] * model.config.layers
    handles = []

    def adder(index: int) -> Callable[..., None]:
        def add(module: Any, args: tuple[Tensor, ...]) -> None:
            sums[index] = sums[index] + args[0].double().abs().flatten(0, -2).sum(0)

        return add

    attentions: list[Any] = [layer.get_submodule("attention") for layer in model.layers]
    if any(a.qk_norm or a.k.bias is not None for a in attentions):
        raise UserError("cskv: start=asvd needs keys without norms and biases; this model has some: take start=pca")
    for index, attention in enumerate(attentions):
        handles.append(attention.k.register_forward_pre_hook(adder(index)))
    try:
        for tokens_BT in batches(tokens_NT):
            model.hidden(tokens_BT.to(model.device), attend=Seen(lambda *_: None))
    finally:
        for handle in handles:
            handle.remove()
    fit = {}
    for which in "kv":
        weights = [getattr(a, which).weight.double() for a in attentions]
        moments = [w @ torch.diag(s / tokens_NT.numel() + 1e-6) @ w.T for w, s in zip(weights, sums, strict=True)]
        fit[f"{which}_LCC"] = principal(torch.stack(moments)).float().cpu()
    return fit
