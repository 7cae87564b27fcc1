"""lq-lora: NormalFloat codes plus a low-rank part per matrix, bits given where they matter under one budget.

Each matrix becomes Q + L1 L2 (form `lq-lora`: the alternation, and the factors to train on), weighted by the root mean
square of its inputs. Which matrix has 2, 3 or 4 bits follows from an integer linear programme (`compress.allocate`):
least sum of squared errors of NormalFloat alone, with the bytes of `bits` on average.

Guo, Greengard, Xing, Kim 2023, arXiv:2311.12023, sections 3.2 and 3.3. Departs: three settings for 432, chosen by the
unweighted error of the codes, and weights from inputs where the authors take squared gradients; see the form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.compress.allocate import Unit, allocate
from modicum.compress.compressors import BlockJob, Compressor
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.registry import load
from modicum.model.attach import is_conv1d
from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear.dense import Dense
from modicum.model.linear.lqlora import Decomposed, LqLora, decompose
from modicum.model.linear.palette import absolute_scales, nearest, normal_float

BITS = (2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Config:
    bits: Annotated[float, Field(ge=2, le=4)] = 3.0  # of a code, on average over all matrices
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64  # inputs that share a scale
    rank: Annotated[int, Field(ge=1)] = 8
    iterations: Annotated[int, Field(ge=1)] = 10  # of the alternation, at most
    allocate: bool = True  # by error; else every matrix has `bits`, which must be whole

    def __post_init__(self) -> None:
        if not self.allocate and self.bits not in BITS:
            raise ValueError(f"bits={self.bits} without allocation must be 2, 3 or 4")


TOY = Config(rank=2, group=16)
SWEEP = ("bits=3,rank=8", "bits=3,rank=8,allocate=false")


@dataclass(frozen=True)
class Factors:
    """What is kept of a matrix: a decomposition and the form's knobs."""

    made: Decomposed
    knobs: dict[str, Any]

    def form(self, layer: nn.Linear, dtype: torch.dtype) -> LinearForm:
        choice = Choice("linear", "lq-lora", self.knobs)
        shape = LinearShape.of(layer.weight.to("meta", dtype), layer.bias, device=str(layer.weight.device))
        base = Dense(load("linear", "dense").config(), shape)
        if base.bias is not None:
            base.bias.data.copy_(layer.bias)
        form: LqLora = load("linear", "lq-lora", LqLora).cls(choice.config(), shape, base)
        form.choice, form.transposed = choice, is_conv1d(layer)
        form.put(self.made, layer.weight)
        return form


class LqLoraCompressor(Compressor):
    requires = frozenset({"calibration_text"})
    needs: ClassVar[frozenset[str]] = frozenset({"squares"})
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.bits: dict[str, int] = {}

    def begin(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        c = self.config
        if not c.allocate:
            self.bits = {name: int(c.bits) for name, _ in weights()}
            return
        units = []
        for name, weight_OI in weights():
            if c.rank > min(weight_OI.shape):
                raise UserError(f"rank={c.rank} is larger than {name}; give rank <= {min(weight_OI.shape)}")
            nbytes = tuple(weight_OI.numel() * b // 8 for b in BITS)
            units.append(Unit((name,), BITS, nbytes, tuple(code_error(weight_OI, b, c.group) for b in BITS)))
        budget = c.bits / 8 * sum(u.nbytes[0] * 8 // BITS[0] for u in units)
        self.bits = {u.names[0]: BITS[s] for u, s in zip(units, allocate(units, budget), strict=True)}

    def block(self, job: BlockJob) -> None:
        c = self.config
        for name, layer in job.linears.items():
            bits = self.bits[job.full_name(name)]
            input_I = job.statistics[name].mean_square.sqrt()
            made = decompose(layer.weight.detach(), bits, c.group, c.rank, c.iterations, None, input_I)
            job.keep(name, Factors(made, {"bits": bits, "group": c.group, "rank": c.rank}))


def code_error(weight_OI: Tensor, bits: int, group: int) -> float:
    """||W - NF_b(W)||^2."""
    scale_OG = absolute_scales(weight_OI, group, torch.bfloat16).to(weight_OI.dtype)
    spread_OI = scale_OG.repeat_interleave(group, 1)[:, : weight_OI.shape[1]]
    values = torch.tensor(normal_float(bits), dtype=weight_OI.dtype)
    codes_OI = nearest(weight_OI / torch.where(spread_OI == 0, 1, spread_OI), values)
    return float((values[codes_OI.long()] * spread_OI - weight_OI).square().sum())
