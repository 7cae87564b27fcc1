"""Block-wise dynamic quantisation to 8 bits: what optimizers with small states share.

A value is divided by the largest magnitude of its block and stored as the index of the nearest of 256 code
points. The points are dense near zero and sparse near one: seven decades, each with twice as many points as
the one below it, so that small values of a block keep a relative precision.

    code = argmin over j of |x / max|block| - q_j|          x = max|block| q_code

Dettmers et al. 2022, arXiv:2110.02861, sections 2.1 and 2.2. Departs from the paper: a block ends with its
row, so that the blocks of a matrix sharded by rows are those of the whole one.

Shapes: R rows, C columns, N blocks of a row (the last may be short).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DECADES = 7


@functools.cache
def code_points(signed: bool) -> tuple[float, ...]:
    """The 256 values that a code may stand for, ascending, in [-1, 1] or [0, 1]."""
    points = [0.0, 1.0]
    for i in range(DECADES):
        n = 2**i if signed else 2 ** (i + 1)
        width = 0.9 / n
        magnitudes = [10.0 ** (i - DECADES + 1) * (0.1 + width * (j + 0.5)) for j in range(n)]
        points += magnitudes + ([-m for m in magnitudes] if signed else [])
    return tuple(sorted(points))


@functools.cache
def _search(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(codes_65536, ends_256): the code a float32's search begins at, by its upper 16 bits; where a code ends.

    The upper bits (sign, exponent, 7 bits of mantissa) leave an interval with one boundary between codes at
    most: a look-up and a comparison find the nearest point, several times as fast as a binary search.
    """
    points = np.array(code_points(signed))
    ends = ((points[1:] + points[:-1]) / 2).astype(np.float32)
    patterns = np.arange(65536, dtype=np.uint32) << 16
    negative = patterns >= 1 << 31
    least = np.where(negative, patterns | 0xFFFF, patterns).astype(np.uint32).view(np.float32)
    codes = np.searchsorted(ends, np.nan_to_num(least)).astype(np.int16)
    return codes, np.append(ends, np.float32(np.inf))


def blocks_of(columns: int, block: int) -> int:
    return math.ceil(columns / block)


def quantise(x_RC: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes_RC uint8, scales_RN float32) of a float32 matrix; a block of zeros has scale zero."""
    rows, columns = x_RC.shape
    n = blocks_of(columns, block)
    width = columns if n == 1 else block
    x_RNW = F.pad(x_RC, (0, n * width - columns)).view(rows, n, width)
    scales_RN = x_RNW.abs().amax(2)
    divisors_RN = torch.where(scales_RN > 0, scales_RN, 1.0)
    scaled_RC = (x_RNW / divisors_RN[:, :, None]).view(rows, n * width)[:, :columns].contiguous()
    starts, ends = (torch.from_numpy(table).to(x_RC.device) for table in _search(signed))
    codes = _look_up(starts, scaled_RC.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF))
    codes += scaled_RC > _look_up(ends, codes.int())
    return codes.to(torch.uint8), scales_RN


def dequantise(codes_RC: Tensor, scales_RN: Tensor, block: int, signed: bool) -> Tensor:
    """The float32 matrix that `quantise` stored."""
    points = torch.tensor(code_points(signed), device=codes_RC.device)
    values_RC = _look_up(points, codes_RC.int())
    columns, n = codes_RC.shape[1], scales_RN.shape[1]
    if n == 1:
        return values_RC.mul_(scales_RN)
    return values_RC.mul_(scales_RN.repeat_interleave(block, 1)[:, :columns])


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for int32 indices; on a CPU many times as fast as indexing."""
    return F.embedding(index, table[:, None]).squeeze(-1)
