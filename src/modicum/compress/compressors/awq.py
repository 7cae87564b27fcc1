"""awq: inputs that matter are scaled up before rounding and down again in the layer before, so that they lose less.

With t = E |x| of each input of layers that read the same tensor, for alpha = 0, 1/20, ... 19/20

    s = max(t^alpha, 1e-4) / sqrt(max s min s),   W' = Q(W diag(s)) diag(s)^-1,

the alpha is taken that changes the output of the inspected module least: attention for q, k, v; the MLP for gate and
up; the layer itself for down, and for o. Then W <- W diag(s), and 1 / s goes into the norm before (q, k, v; gate,
up), into the rows of up (down) or of v (o), which changes no output. o keeps its scale where v has another width
(grouped-query attention). After that each group's range is shrunk to the best of 10 steps down to 0.55 by the error
of the layer's output, but for q and k, and weights are rounded to nearest.

Lin, Tang, Tang, Yang, Dang, Han 2023, arXiv:2306.00978, section 3.2, and mit-han-lab/llm-awq `auto_scale.py`. Inputs
are those of the original model. Departs: both ends of a group's range shrink, where the authors clamp at a magnitude;
the error of down and of ranges is exact by X X^T, where the authors take a sample; a layer whose partners are not
compressed keeps its scale, so that nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.compressors import BlockJob, Compressor
from modicum.compress.compressors._affine import AffineConfig, grid, groups, rounded, width
from modicum.model.attend import DenseAttend

SHRINKS = [1 - step / 20 for step in range(10)]


@dataclass(frozen=True, kw_only=True)
class Config(AffineConfig):
    steps: Annotated[int, Field(ge=1)] = 20  # values of alpha that are tried; 1: no scaling
    clip: bool = True  # search each group's range
    inspect: Annotated[int, Field(ge=1)] = 512  # tokens on which attention and MLP are inspected, at least a sequence


CLAIM = {"figure": "at 3 bits, group 128, WikiText2 perplexity 6.24 of Llama-2-7B against 6.66 by round-to-nearest",
         "where": "section 5.2", "scale": "7B parameters"}  # fmt: skip
SWEEP = ("bits=2,group=64", "bits=3,group=64")


class Awq(Compressor):
    requires = frozenset({"calibration_text", "pre_norm"})
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "magnitudes"})
    streams: ClassVar[tuple[str, ...]] = ("original",)
    config: Config

    def block(self, job: BlockJob) -> None:
        block: Any = job.block
        grams = {name: job.statistics[name].gram for name in job.linears}
        attention = ("attention.q", "attention.k", "attention.v")
        mlp = ("mlp.gate", "mlp.up") if block.mlp.gated else ("mlp.up",)
        for names, module, norm in (
            (attention, block.attention, block.attention_norm),
            (mlp, block.mlp, block.mlp_norm),
        ):
            if job.linears.keys() >= set(names):
                self._scale(job, names, self._module_error(job, module), grams, norm)
        before = {"mlp.down": "mlp.up"} if block.mlp.gated else {}
        if block.attention.v.out_features == block.attention.o.in_features:
            before["attention.o"] = "attention.v"
        for name, source in before.items():
            if job.linears.keys() >= {name, source}:
                self._scale(job, (name,), _layer_error(job.linears[name], grams[name]), grams, job.linears[source])
        for name, layer in job.linears.items():
            searched = self.config.clip and name not in attention[:2]
            config = self.of_matrix(job.full_name(name)).config
            shrink = clipping(layer.weight.detach(), grams[name], config) if searched else 1.0
            job.keep(name, rounded(layer.weight.detach(), config, shrink))

    def _scale(
        self,
        job: BlockJob,
        names: Sequence[str],
        error: Callable[[], float],
        grams: dict[str, Tensor],
        before: nn.Module,
    ) -> None:
        """Scale the inputs of layers that read one tensor by the best s, and the outputs of `before` by its inverse."""
        layers = [job.linears[name] for name in names]
        configs = [self.of_matrix(job.full_name(name)).config for name in names]
        originals = [layer.weight.detach().clone() for layer in layers]
        mean_I = job.statistics[names[0]].mean_magnitude.to(originals[0].dtype)
        best, scale_I = math.inf, torch.ones_like(mean_I)
        for step in range(self.config.steps):
            s_I = scale_of(mean_I, step / self.config.steps)
            for layer, weight_OI, config in zip(layers, originals, configs, strict=True):
                layer.weight.data = rounded(weight_OI * s_I, config).weight(weight_OI.dtype) / s_I
            reached = error()
            if reached < best:
                best, scale_I = reached, s_I
        for layer, weight_OI in zip(layers, originals, strict=True):
            layer.weight.data = weight_OI * scale_I
        divide_outputs(before, scale_I)
        for name in names:
            grams[name] = grams[name] / torch.outer(scale_I, scale_I).double()

    def _module_error(self, job: BlockJob, module: nn.Module) -> Callable[[], float]:
        """Mean square change of the output of attention or MLP, on its own inputs."""
        x_BTD, rotation = next(job.inputs())
        x_BTD = x_BTD[: max(1, self.config.inspect // x_BTD.shape[1])]
        caught: list[tuple[Any, ...]] = []
        handle = module.register_forward_pre_hook(lambda module, args: caught.append(args))
        job.block(x_BTD, rotation, DenseAttend())
        handle.remove()
        truth = module(*caught[0])
        return lambda: float((module(*caught[0]) - truth).square().mean())


def _layer_error(layer: nn.Linear, gram_II: Tensor) -> Callable[[], float]:
    """||(W' - W) X||^2 of a layer's weight as it then is."""
    truth_OI = layer.weight.detach().clone()
    gram_II = gram_II.to(truth_OI.dtype)

    def error() -> float:
        left = layer.weight.detach() - truth_OI
        return float((left @ gram_II * left).sum())

    return error


def scale_of(mean_I: Tensor, alpha: float) -> Tensor:
    """s of one alpha."""
    s_I = mean_I.pow(alpha).clamp_min(1e-4)
    return s_I / (s_I.max() * s_I.min()).sqrt()


def divide_outputs(before: nn.Module, s_I: Tensor) -> None:
    """Let a norm or a linear layer give its outputs divided by s."""
    weight: Any = before.weight
    if isinstance(before, nn.Linear):
        weight.data = weight.data / s_I[:, None]
    elif getattr(before, "plus_one", False):
        weight.data = (1 + weight.data) / s_I - 1
    else:
        weight.data = weight.data / s_I
    if isinstance(bias := getattr(before, "bias", None), Tensor):
        bias.data = bias.data / s_I


def clipping(weight_OI: Tensor, gram_II: Tensor, config: AffineConfig) -> Tensor:
    """shrink_OG: by how much each group's range is best shrunk, by the error of the group's part of the output."""
    inputs, group = weight_OI.shape[1], width(config, weight_OI.shape[1])
    weight_OGi = groups(weight_OI, group)
    padded = nn.functional.pad(gram_II.to(weight_OI.dtype), (0, -inputs % group, 0, -inputs % group))
    gram_Gii = padded.unflatten(1, (-1, group)).unflatten(0, (-1, group)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    best = torch.full(weight_OGi.shape[:-1], torch.inf, dtype=weight_OI.dtype, device=weight_OI.device)
    clip_OG = torch.ones_like(best)
    for shrink in SHRINKS:
        left_GOi = (weight_OGi - grid(weight_OGi, config, shrink).nearest(weight_OGi)).transpose(0, 1)
        error_OG = (left_GOi @ gram_Gii * left_GOi).sum(-1).T
        clip_OG, best = torch.where(error_OG < best, shrink, clip_OG), torch.minimum(error_OG, best)
    return clip_OG
