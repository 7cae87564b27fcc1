"""efficientqat: each block trained through its own rounding, then the scales of the whole model on text.

Block-AP, block by block: with s = (max W - min W) / (2^b - 1) and z = round(-min W / s) per group at the start,

    W' = s (clamp(round(W / s) + round(z), 0, 2^b - 1) - round(z)),
    min over W, s, z of all linear layers (and the norms' weights) of ||block'(x_q) - block(x)||^2

where x_q comes out of the blocks quantised before and x out of the original ones. Gradients pass straight through both
roundings and the bounds of s and z, not through the clamp of the code: inside the range dW'/dW = 1, dW'/ds =
round(W / s) - W / s, dW'/dz = 0; outside 0, code - z, -s. Then s is rounded to its stored dtype and the codes are
frozen. E2E-QP: with codes and z fixed, s alone is trained on the next token with the whole model.

Chen, Shao, Xu, Wang, Gao, Zhang, Luo 2024, arXiv:2407.11062, and OpenGVLab/EfficientQAT `quantize/block_ap.py`,
`quantize/quantizer.py`. Departs: sequences of validation (one of `heldout`) pick the best epoch of a block, the start
included; the zero point is stored as the form's number s (2^(b-1) - z), rounded to `scale_dtype`, not as an integer;
E2E-QP computes in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.compressors import Codes
from modicum.compress.compressors._affine import AffineConfig, groups, width
from modicum.compress.compressors._blockwise import BlockTrained, BlockTraining, TrainedWeight, decay
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.linear import LinearForm
from modicum.model.linear.affine import unpack
from modicum.model.linear.int4 import Int4

SMALLEST, LARGEST = 1e-4, 1e4  # bounds of a scale


@dataclass(frozen=True, kw_only=True)
class Config(BlockTraining, AffineConfig):
    weight_rate: Annotated[float, Field(ge=0)] = 0.0  # learning rate of weights; 0: 2e-5 at two bits, else 1e-5
    scale_rate: Annotated[float, Field(ge=0)] = 1e-4  # of s and z in Block-AP
    tuning_epochs: Annotated[int, Field(ge=0)] = 1  # of E2E-QP; 0 leaves it out
    tuning_rate: Annotated[float, Field(ge=0)] = 0.0  # of s in E2E-QP; 0: 2e-5 at two bits, else 1e-5
    clip: Annotated[float, Field(gt=0)] = 0.3  # largest norm of the gradient in E2E-QP


TOY = Config(bits=3, group=16, epochs=1, heldout=4, weight_rate=1e-3, scale_rate=1e-3, tuning_rate=1e-3)
CLAIM = {"figure": "at 2 bits, group 64, WikiText2 perplexity 6.86 of Llama-2-7B against 5.47 in fp16",
         "where": "README of the authors' code", "scale": "7B parameters"}  # fmt: skip
SWEEP = (  # few steps, so larger rates than the default
    "bits=2,group=64,weight_rate=1e-3,scale_rate=1e-3",
    "bits=3,group=64,weight_rate=1e-3,scale_rate=1e-3",
)


class _Rounded(torch.autograd.Function):
    """W' of W (O, G, i), s and z (O, G, 1), with the gradients above."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        s, z = scale.clamp(SMALLEST, LARGEST), zero.round().clamp(0, top)
        ratio = weight / s
        near = ratio.round()
        code = (near + z).clamp_(0, top)
        inside = code == near + z
        ctx.save_for_backward(inside, torch.where(inside, near - ratio, code - z), s)
        return s * (code - z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        inside, by_scale, s = ctx.saved_tensors
        through = grad * inside
        by_zero = (through - grad).sum(-1, keepdim=True) * s
        return through, (grad * by_scale).sum(-1, keepdim=True), by_zero, None


class Quantiser(TrainedWeight):
    """The trained weight, scale and zero point of one layer; `forward` gives the rounded weight_OI."""

    def __init__(self, weight_OI: Tensor, config: AffineConfig):
        super().__init__()
        self.config, self.inputs = config, weight_OI.shape[1]
        self.group, self.top = width(config, self.inputs), 2**config.bits - 1
        weight_OGi = groups(weight_OI, self.group)
        low, high = weight_OGi.amin(-1, keepdim=True), weight_OGi.amax(-1, keepdim=True)
        scale = ((high - low) / self.top).clamp(SMALLEST, LARGEST)
        self.weight = nn.Parameter(weight_OI.clone())
        self.scale = nn.Parameter(scale)
        self.zero = nn.Parameter((-low / scale).round().clamp(0, self.top))

    def forward(self) -> Tensor:
        weight_OGi = groups(self.weight, self.group)
        rounded: Tensor = _Rounded.apply(weight_OGi, self.scale, self.zero, self.top)
        return rounded.flatten(1)[:, : self.inputs]

    @torch.no_grad()
    def codes(self) -> Codes:
        """As they are stored: the codes belong to the rounded scale."""
        dtype = self.weight.dtype
        s = self.scale.clamp(SMALLEST, LARGEST).to(self.config.dtype).to(dtype)
        z = self.zero.round().clamp(0, self.top)
        codes_OGi = ((groups(self.weight, self.group) / s).round() + z).clamp(0, self.top)
        codes_OI = codes_OGi.flatten(1)[:, : self.inputs]
        return Codes.of(codes_OI, s[..., 0], (s * (self.config.middle - z))[..., 0], self.config)


class EfficientQat(BlockTrained):
    config: Config

    def quantiser(self, weight_OI: Tensor, config: Any) -> Quantiser:
        return Quantiser(weight_OI, config)

    def weight_rate(self) -> float:
        return self.config.weight_rate or rate_for(self.config.bits)

    def finish(self, model: Decoder) -> Decoder:
        if self.config.tuning_epochs and self.tokens_NT is not None:
            tune_scales(model, self.tokens_NT, self.config)
        return model


def rate_for(bits: int) -> float:
    """The authors' learning rate of weights, and of scales in E2E-QP."""
    return 2e-5 if bits == 2 else 1e-5


class _Product(torch.autograd.Function):
    """x W^T for W = s (q - z), with W decoded again in the backward pass; gradients for x and s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_OG: Tensor, layer: Scaled) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, scale_OG)
        return F.linear(x, layer.weight(scale_OG).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, scale_OG = ctx.saved_tensors
        layer: Scaled = ctx.layer
        by_weight_OI = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(scale_OG.dtype)
        by_scale_OG = (groups_of(by_weight_OI, layer.group) * layer.steps_OGi()).sum(-1)
        return grad @ layer.weight(scale_OG).to(grad.dtype), by_scale_OG, None


class Scaled(nn.Module):
    """A quantised layer whose scales are trained, in float32: W = s (q - z) with z = 2^(b-1) - zero / s rounded."""

    def __init__(self, form: Any):
        super().__init__()
        bits = 4 if isinstance(form, Int4) else form.bits
        codes = form._codes(form.packed) if isinstance(form, Int4) else unpack(form.packed, bits)
        self.form, self.codes_OI, self.group, self.middle = form, codes, form.group, 2 ** (bits - 1)
        scale = form.scale.float()
        self.zero_OG = self.middle - (form.zero.float() / torch.where(scale == 0, 1, scale)).round()
        self.scale_OG = nn.Parameter(scale)

    def steps_OGi(self) -> Tensor:
        """q - z."""
        return groups_of(self.codes_OI.float(), self.group) - self.zero_OG[..., None]

    def weight(self, scale_OG: Tensor) -> Tensor:
        return (scale_OG[..., None] * self.steps_OGi()).flatten(1)[:, : self.form.in_features]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.scale_OG, self)
        return y if self.form.bias is None else y + self.form.bias

    @torch.no_grad()
    def store(self) -> LinearForm:
        """The form with the trained scales."""
        scale = self.scale_OG.clamp(SMALLEST, LARGEST).to(self.form.scale.dtype)
        self.form.scale.copy_(scale)
        self.form.zero.copy_(scale.float() * (self.middle - self.zero_OG))
        self.form._kernel_weight = None
        form: LinearForm = self.form
        return form


def groups_of(values_OI: Tensor, group: int) -> Tensor:
    """(O, I) to (O, G, i), the last group filled up with zeros."""
    return F.pad(values_OI, (0, -values_OI.shape[1] % group)).unflatten(1, (-1, group))


def tune_scales(model: Decoder, tokens_NT: Tensor, config: Config) -> None:
    """E2E-QP: train the scales of all quantised layers of the blocks on the next token, in place."""
    forms = {n: f for n, f in attach.forms(model).items() if n.startswith("layers.") and hasattr(f, "zero")}
    layers = {name: Scaled(form) for name, form in forms.items()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        _replace(model, name, layer)
    rate = config.tuning_rate or rate_for(config.bits)
    parameters = [layer.scale_OG for layer in layers.values()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    batches = tokens_NT.to(model.device).split(config.batch)
    steps = config.tuning_epochs * len(batches)
    try:
        with torch.enable_grad():
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = rate * decay(step, steps)
                tokens_BT = batches[step % len(batches)]
                logits_BTV = model(tokens_BT[:, :-1])
                optimizer.zero_grad()
                F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
                nn.utils.clip_grad_norm_(parameters, config.clip)
                optimizer.step()
    finally:
        for name, layer in layers.items():
            _replace(model, name, layer.store())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, False))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)
