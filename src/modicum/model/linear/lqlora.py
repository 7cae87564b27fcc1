"""lq-lora: a weight as NormalFloat codes plus a low-rank part that starts at what the codes lose, and is trained.

    W ~ Q + s B A,   alternating from Q = 0:  s B A = SVD_r(W - Q),  Q = NF_b(W - s B A)

until the error ||D1 (W - Q - s B A) D2||_F rises; the best iterate is kept. With weights D1 of outputs and D2 of inputs
the decomposition is of D1 (W - Q) D2, whose factors are divided by them again, which is exact for importances that are
a product of the two. Training goes on from B and A with Q frozen, where QLoRA (Dettmers et al. 2023, arXiv:2305.14314)
starts at B = 0 and leaves the error of Q to training.

Guo, Greengard, Xing, Kim 2023, arXiv:2311.12023, section 3 and algorithm 1, and HanGuo97/lq-lora `models/lq_utils.py`.
Departs: the best iterate is kept, not the one after; scales are not quantised a second time (form `palette`); D2 comes
from sample inputs where they are given and D1 from the caller (`take` leaves it 1), while the authors take both from
squared gradients. The factors are not a change of the original weight, so they are stored with their codes as a model
folder and never in PEFT's format.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.budget.cost import Cost
from modicum.core.choice import Choice
from modicum.model.linear import LinearForm, LinearShape, check_rank
from modicum.model.linear import palette as tables
from modicum.model.linear._adapter import Adapter
from modicum.model.linear.palette import Palette, absolute_scales, nearest, normal_float

OVERSAMPLING, EXACT = 10, 128  # of the randomised decomposition; up to here all singular vectors are computed
CLAIM = {"figure": "Llama-2-70B at 2.75 bits competitive with full precision after fine-tuning", "where": "abstract",
         "scale": "70B parameters"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    bits: Literal[2, 3, 4] = 4  # of a NormalFloat code
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64  # inputs that share a scale
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # on the input of the low-rank part, while training
    iterations: Annotated[int, Field(ge=1)] = 20  # of the alternation, at most


TOY = Config(rank=4, bits=3, group=16)


class LqLora(Adapter):
    provides = frozenset({"adapter", "factors", "fit", "merge", "trainable"})
    fit_error = 0.25
    config: Config
    base: Palette

    def __init__(self, config: Config, shape: LinearShape, base: LinearForm):
        check_rank("lq-lora", config.rank, shape)
        if not isinstance(base, Palette):
            knobs: dict[str, Any] = {"bits": config.bits, "table": "normal", "group": config.group}
            quantised = Palette(tables.Config(**knobs), shape)
            quantised.choice = Choice("linear", "palette", knobs)
            quantised.bias = base.bias
            base = quantised
        super().__init__(config, shape, base)
        self.A = nn.Parameter(self._empty(config.rank, shape.in_features))
        self.B = nn.Parameter(self._empty(shape.out_features, config.rank))
        self.scaling = config.alpha / config.rank

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        input_I = None if calibration_NI is None else calibration_NI.float().square().mean(0).sqrt()
        c = self.config
        self.put(decompose(weight_OI.float(), c.bits, c.group, c.rank, c.iterations, None, input_I), weight_OI)

    def put(self, made: Decomposed, weight_OI: Tensor) -> None:
        """Take over a decomposition."""
        self.base.put(made.codes_OI, made.scale_OG)
        self.A.data.copy_(made.down_RI)
        self.B.data.copy_(made.up_OR / self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x = F.dropout(x.to(self.A.dtype), self.config.dropout, self.training)
        return y + (self.scaling * F.linear(F.linear(x, self.A), self.B)).to(y.dtype)

    def dense(self) -> Tensor:
        weight = self.base.dense()
        return weight + (self.scaling * (self.B @ self.A)).to(weight.dtype)

    def rows(self, index: Tensor) -> Tensor:
        rows = self.base.rows(index)
        return rows + (self.scaling * F.embedding(index, self.B) @ self.A).to(rows.dtype)

    def trainable(self) -> list[nn.Parameter]:
        return [self.A, self.B]

    @classmethod
    def cost(cls, config: Any, shape: LinearShape | tuple[int, int], tokens: float = 0) -> Cost:
        """Bytes are those of codes, scales and factors: nothing of the original weight is left."""
        if isinstance(shape, tuple):
            shape = LinearShape(out_features=shape[0], in_features=shape[1], dtype=torch.bfloat16)
        shape = dataclasses.replace(shape, device="meta")
        form = cls(config, shape, Palette(tables.Config(bits=config.bits, table="normal", group=config.group), shape))
        trained = sum(p.numel() for p in form.trainable())
        flops = 2.0 * tokens * (shape.in_features * shape.out_features + trained)
        return Cost(tokens=tokens, parameters=trained, disk_bytes=form.nbytes(), flops=flops)


@dataclass(frozen=True)
class Decomposed:
    """NormalFloat codes_OI and scale_OG, and the low-rank part up_OR @ down_RI; the weighted error, relative."""

    codes_OI: Tensor
    scale_OG: Tensor
    up_OR: Tensor
    down_RI: Tensor
    error: float


def decompose(
    weight_OI: Tensor,
    bits: int,
    group: int,
    rank: int,
    iterations: int,
    output_O: Tensor | None = None,
    input_I: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Decomposed:
    """Alternate between the low-rank part and the codes of a float matrix; output_O, input_I: D1 and D2."""
    d1 = _safe(output_O, weight_OI.shape[0], weight_OI)
    d2 = _safe(input_I, weight_OI.shape[1], weight_OI)
    values = torch.tensor(normal_float(bits), dtype=weight_OI.dtype, device=weight_OI.device)
    norm = float((d1[:, None] * weight_OI * d2).norm()) or 1.0
    rounded_OI, best = torch.zeros_like(weight_OI), None
    for _ in range(iterations):
        up_OR, down_RI = low_rank(d1[:, None] * (weight_OI - rounded_OI) * d2, rank)
        up_OR, down_RI = up_OR / d1[:, None], down_RI / d2
        left_OI = weight_OI - up_OR @ down_RI
        scale_OG = absolute_scales(left_OI, group, dtype)
        spread_OI = scale_OG.to(weight_OI.dtype).repeat_interleave(group, 1)[:, : weight_OI.shape[1]]
        codes_OI = nearest(left_OI / torch.where(spread_OI == 0, 1, spread_OI), values)
        rounded_OI = values[codes_OI.long()] * spread_OI
        error = float((d1[:, None] * (left_OI - rounded_OI) * d2).norm()) / norm
        if best is not None and error >= best.error:
            break
        best = Decomposed(codes_OI, scale_OG, up_OR, down_RI, error)
    assert best is not None
    return best


def low_rank(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up_OR, down_RI) of the truncated SVD, the root of the singular values on each side.

    Exact for small matrices; a randomised range with two power iterations (Halko et al. 2011) for others.
    """
    small = min(weight_OI.shape)
    if small <= max(EXACT, 4 * (rank + OVERSAMPLING)):
        U, S, Vh = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        generator = torch.Generator(weight_OI.device).manual_seed(0)
        sketch = torch.randn(
            weight_OI.shape[1], rank + OVERSAMPLING, dtype=weight_OI.dtype, device=weight_OI.device, generator=generator
        )
        basis = torch.linalg.qr(weight_OI @ sketch).Q
        for _ in range(2):
            basis = torch.linalg.qr(weight_OI @ torch.linalg.qr(weight_OI.T @ basis).Q).Q
        U, S, Vh = torch.linalg.svd(basis.T @ weight_OI, full_matrices=False)
        U = basis @ U
    root_R = S[:rank].sqrt()
    return U[:, :rank] * root_R, root_R[:, None] * Vh[:rank]


def _safe(weights: Tensor | None, count: int, like: Tensor) -> Tensor:
    """Positive weights of mean square one; ones where there are none."""
    if weights is None:
        return torch.ones(count, dtype=like.dtype, device=like.device)
    given = weights.to(like)
    root = math.sqrt(float(given.square().mean())) or 1.0
    return (given / root).clamp_min(1e-3)
