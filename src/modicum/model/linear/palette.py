"""palette: weights as indices into a table of 2^b values, of the whole matrix or of a few rows.

    W_oi ~ t_r[q_oi]            table=learned: t_r of row group r = o // rows, by k-means (Lloyd 1982)
    W_oi ~ s_og n[q_oi]         table=normal: n = NormalFloat, s the largest |W| of a group of inputs

NormalFloat has the quantiles of a normal distribution as values, scaled so that the ends are -1 and 1: of 2^(b-1)
probabilities from 1 - o to 1/2 and 2^(b-1) + 1 from 1/2 to o, o = 0.9677083, one of the two halves dropped (Dettmers et
al. 2023, arXiv:2305.14314, appendix E, and HanGuo97/lq-lora `quantization_utils.py`). Stored: b bits per entry, packed
as `affine` packs them, and either 2^b numbers per row group or one per group of inputs: 3.0 bits per weight for one
learned table at bits=3, 3.25 for NormalFloat with group=64. Lloyd's steps are exact for one dimension: between sorted
values the boundaries are midpoints, and the means come from cumulative sums. Departs: scales are kept as they are in
`scale_dtype`, where QLoRA and LQ-LoRA quantise them a second time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.linear import LinearShape
from modicum.model.linear._quantised import SCALE_DTYPES, QuantisedForm, round_up
from modicum.model.linear.affine import pack, unpack

END = 0.9677083  # probability of NormalFloat's largest value
STEPS = 30  # of Lloyd's iteration, at most


@dataclass(frozen=True, kw_only=True)
class Config:
    bits: Literal[2, 3, 4] = 3  # of an index
    table: Literal["learned", "normal"] = "learned"
    rows: Annotated[int, Field(ge=0)] = 0  # outputs that share a learned table; 0: all
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64  # inputs that share the scale of NormalFloat
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of scales and learned tables


SWEEP = ("bits=3", "bits=3,table=normal", "bits=4", "bits=4,table=normal")
TOY = Config(bits=3)


class Palette(QuantisedForm):
    provides = frozenset({"adapter_base", "embedding", "fit", "merge"})
    stored = frozenset({"table", "scale"})
    fit_error = 0.25
    config: Config
    packed: Tensor
    table: Tensor
    scale: Tensor

    def __init__(self, config: Config, shape: LinearShape):
        super().__init__(config, shape)
        self.bits, self.normal = config.bits, config.table == "normal"
        self.group = min(config.group, -(-shape.in_features // 8) * 8)
        self.n_groups = -(-shape.in_features // self.group)
        self.padded = -(-shape.in_features // 8) * 8
        self.rows_each = min(config.rows or shape.out_features, shape.out_features)
        dtype = SCALE_DTYPES[config.scale_dtype]
        tables = 0 if self.normal else -(-shape.out_features // self.rows_each)
        self.register_buffer("packed", self._empty(shape.out_features, self.padded * self.bits // 8, dtype=torch.uint8))
        self.register_buffer("table", self._empty(tables, 2**self.bits, dtype=dtype))
        scales = (shape.out_features, self.n_groups) if self.normal else (0, 0)
        self.register_buffer("scale", self._empty(*scales, dtype=dtype))

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        weight = weight_OI.to(self.packed.device, torch.float32)
        if self.normal:
            scale_OG = absolute_scales(weight, self.group, self.scale.dtype)
            values = torch.tensor(normal_float(self.bits), device=weight.device)
            spread_OI = scale_OG.float().repeat_interleave(self.group, 1)[:, : self.in_features]
            self.put(nearest(weight / torch.where(spread_OI == 0, 1, spread_OI), values), scale_OG)
            return
        codes, tables = [], []
        for part in weight.split(self.rows_each):
            table_K = means(part, 2**self.bits).to(self.table.dtype)
            codes.append(nearest(part, table_K.float()))
            tables.append(table_K)
        self.put(torch.cat(codes), torch.stack(tables))

    def put(self, codes_OI: Tensor, values: Tensor) -> None:
        """Take over indices (uint8), and tables_RK (sorted or not) or, of NormalFloat, scales_OG."""
        self.packed.copy_(pack(torch.nn.functional.pad(codes_OI, (0, self.padded - codes_OI.shape[1])), self.bits))
        (self.scale if self.normal else self.table).copy_(values)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self._decode(self.packed, self.scale, dtype, None)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.flatten()
        rows = self._decode(self.packed[flat], self.scale[flat] if self.normal else self.scale, self.dtype, flat)
        return rows.view(*index.shape, self.in_features)

    def _decode(self, packed: Tensor, scale: Tensor, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
        codes_NI = unpack(packed, self.bits)[:, : self.in_features].int()
        if self.normal:
            values = torch.tensor(normal_float(self.bits), dtype=dtype, device=packed.device)
            spread_NI = scale.to(dtype).repeat_interleave(self.group, 1)[:, : self.in_features]
            return values.index_select(0, codes_NI.flatten()).view(codes_NI.shape) * spread_NI
        table = self.table.to(dtype)
        if len(table) > 1:
            numbers = torch.arange(len(codes_NI), device=packed.device) if rows is None else rows
            codes_NI = codes_NI + (numbers.int() // self.rows_each * 2**self.bits)[:, None]
        return table.flatten().index_select(0, codes_NI.flatten()).view(codes_NI.shape)


@functools.cache
def normal_float(bits: int) -> tuple[float, ...]:
    """The 2^bits values of NormalFloat, ascending, from -1 to 1; 0 is among them."""
    from scipy.stats import norm

    half = 2 ** (bits - 1)
    low = torch.linspace(1 - END, 0.5, half, dtype=torch.float64)
    high = torch.linspace(0.5, END, half + 1, dtype=torch.float64)[1:]
    values = [float(v) for v in norm.ppf(torch.cat([low, high]).numpy())]
    return tuple(v / max(abs(values[0]), values[-1]) for v in values)


def absolute_scales(weight_OI: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The largest |W| of each group (O, G), rounded up to `dtype`."""
    missing = -weight_OI.shape[1] % group
    padded = torch.nn.functional.pad(weight_OI, (0, missing))
    return round_up(padded.unflatten(1, (-1, group)).abs().amax(-1), dtype)


def nearest(values: Tensor, table_K: Tensor) -> Tensor:
    """Indices (uint8) of the nearest entries of a table in any order."""
    ordered_K, order_K = table_K.sort()
    edges = (ordered_K[1:] + ordered_K[:-1]) / 2
    return order_K.to(torch.uint8)[torch.bucketize(values.contiguous(), edges)]


def means(values: Tensor, k: int, weights: Tensor | None = None, start_K: Tensor | None = None) -> Tensor:
    """k ascending means of all values by Lloyd's iteration, weighted if given; it starts at equal parts of the values.

    An empty cluster keeps its mean. Raises `UserError` for values that are not finite.
    """
    flat, order = values.detach().flatten().double().sort()
    if not bool(flat.isfinite().all()):
        raise UserError("its weight holds NaN or infinite values, which have no means")
    weight = torch.ones_like(flat) if weights is None else weights.flatten().double()[order]
    zero = flat.new_zeros(1)
    mass, moment = torch.cat([zero, weight.cumsum(0)]), torch.cat([zero, (weight * flat).cumsum(0)])
    if start_K is None:
        cuts = ((torch.arange(k, device=flat.device) + 0.5) * len(flat) / k).long().clamp(max=len(flat) - 1)
        mean_K = flat[cuts].clone()
    else:
        mean_K = start_K.double().sort().values
    for _ in range(STEPS):
        inner = torch.searchsorted(flat, (mean_K[1:] + mean_K[:-1]) / 2)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(flat))])
        own = mass[edges[1:]] - mass[edges[:-1]]
        moved = torch.where(own > 0, (moment[edges[1:]] - moment[edges[:-1]]) / own.clamp_min(1e-300), mean_K)
        if torch.equal(moved, mean_K):
            break
        mean_K = moved
    return mean_K.to(values.dtype)
