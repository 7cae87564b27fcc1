"""tpla: latent attention whose cache is split over devices, each with a softmax of its own over a slice of the latent.

    before    c = norm(x W_c U),  W_uk <- W_uk diag(g) U,  W_uv <- W_uv diag(g) U      U orthogonal, g the norm's weight
    device i  score_h = (q_r,h k_r + b_i q_n,h W_uk,h,i c_i) / sqrt(d + p)
              c_i = (x W_c U)_i / sqrt(ratio_i mean square of the slice)
    sum       y_h = sum over i of W_uv,h,i (sum over tokens a_h,i c_i)                 one all-reduce

A cache of one latent vector (mixer `mla`) would be whole on every device; here a device keeps r/n of its r dimensions
and the rotated key. Turning by U and folding g change nothing; what is lost comes from the norm of a slice and from a
softmax that sees a part of the score. `rotate=pca` takes the directions of the latents of the text, so that the first
slice has most of the score; each slice's norm is corrected by a ratio measured there, and b = 1. `hadamard` (latents of
a power of two) spreads the score evenly, so b = n; `none` slices what is there, with b = n. Weights are as large as
before. On several processes: `model.mixers.mla.shard`.

Tang et al. 2025, arXiv:2508.15881 (abstract and summaries read, not its equations: b and ratio follow from the above).
Departs: prompts are computed by the split attention too, where the paper computes them whole and splits decoding alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.compressors import BlockJob, Compressor
from modicum.core.errors import UserError
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.mixers import mla


@dataclass(frozen=True, kw_only=True)
class Config:
    ranks: Annotated[int, Field(ge=1)] = 2  # devices
    rotate: Literal["pca", "hadamard", "none"] = "pca"  # of the latent, before it is sliced


TOY_SHAPE = {"family": "modicum"} | mla.shape(heads=4, latent=16, rotated=4)  # of the model that conformance compresses
CLAIM = {"figure": "1.79 and 1.93 times as fast at 32k tokens of context, quality kept", "where": "abstract",
         "scale": "DeepSeek-V3, Kimi-K2"}  # fmt: skip
SWEEP = ("rotate=pca", "rotate=hadamard", "rotate=none")


class Tpla(Compressor):
    requires = frozenset({"calibration_text"})
    leaves = "shape"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.ratios: dict[str, list[float]] = {}  # by block

    def check(self, shape: DecoderConfig) -> None:
        layers = shape.per_layer
        if shape.varying - {"mlp_width"} or (layers[0].mixer, layers[0].kv_heads) != ("mla", 1):
            raise UserError("tpla splits latent attention: it needs a model with the mixer mla in every layer, unsplit")
        latent = mla.sizes(layers[0], shape.width)[-1]
        if latent % self.config.ranks:
            raise UserError(f"tpla: ranks={self.config.ranks} does not divide the latent's {latent} dimensions")
        if self.config.rotate == "hadamard" and latent & (latent - 1):
            raise UserError(f"tpla: rotate=hadamard needs a power of two, and the latent has {latent}; take rotate=pca")

    @torch.no_grad()
    def block(self, job: BlockJob) -> None:
        block: Any = job.block
        attention, ranks = block.attention, self.config.ranks
        moment_RR = torch.zeros(2 * (attention.norm.numel(),), dtype=torch.float64)
        count = 0
        for x_BTD, _ in job.inputs():
            c_BNTC = attention.latent(block.attention_norm(x_BTD))[1] / attention.norm
            flat_NR = c_BNTC.flatten(0, 2).double()
            moment_RR += flat_NR.T @ flat_NR
            count += len(flat_NR)
        turn_RR = self.directions(moment_RR)
        fold(attention, turn_RR)
        mean_R = (turn_RR.T @ moment_RR @ turn_RR).diagonal() / count
        slices_N = mean_R.unflatten(0, (ranks, -1)).mean(1)
        self.ratios[str(job.index)] = (1 / slices_N).tolist() if self.config.rotate == "pca" else [1.0] * ranks

    def directions(self, moment_RR: Tensor) -> Tensor:
        """U, orthogonal, float64; the latents' second moment as it is summed over tokens."""
        R = len(moment_RR)
        if self.config.rotate == "none":
            return torch.eye(R, dtype=torch.float64)
        if self.config.rotate == "pca":
            return torch.linalg.eigh(moment_RR)[1].flip(1)
        turn = torch.ones(1, 1, dtype=torch.float64)
        while len(turn) < R:
            turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
        return turn / R**0.5

    def finish(self, model: Decoder) -> Decoder:
        if self.config.ranks == 1:
            return model
        made = mla.split(model, self.config.ranks)
        boost = 1.0 if self.config.rotate == "pca" else float(self.config.ranks)
        with torch.no_grad():
            for index, layer in enumerate(made.layers):
                layer.attention.ratio.copy_(torch.tensor(self.ratios[str(index)]))
                layer.attention.boost.fill_(boost)
        return made

    def state(self) -> dict[str, Any]:
        return {"ratios": self.ratios}

    def set_state(self, state: dict[str, Any]) -> None:
        self.ratios = state["ratios"]


def fold(attention: nn.Module, turn_RR: Tensor) -> None:
    """Turn the latent by U, in place, with the norm's weight in what reads it: the attention computes the same."""
    a: Any = attention
    weight = a.kv.weight.double()
    weight[a.rotated :] = turn_RR.T @ weight[a.rotated :]
    a.kv.weight.copy_(weight)
    for up in (a.k_up, a.v_up):
        up.weight.copy_(up.weight.double() * a.norm.double() @ turn_RR)
    a.norm.fill_(1.0)
