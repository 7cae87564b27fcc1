"""bitstack: a weight as a stack of blocks of about one bit per entry, each correcting those before it.

A block holds the signs of what is left of the weight and a rank-k approximation of its magnitudes; what it
misses is left to the next block. Any number of blocks from the bottom is a weight, the more the better, so
one file serves every memory size: blocks are added to a running model and taken off again one at a time.

    R_0 = W diag(s),   s_i = |X_i| (2-norm of input channel i over the calibration data)
    block j:  Sigma_j = sign(R_j),   U_j V_j = rank-k SVD of |R_j|,   R_{j+1} = R_j - Sigma_j * U_j V_j
    W ~ (sum of Sigma_j * U_j V_j) diag(s)^-1

The last is computed anew for each product: the dense weight is never kept. Which layer gets a block first is
measured over the whole model (`compress.stacking`); here blocks are only made, held and summed.

Wang et al. 2024, arXiv:2410.23918, section 2.
Departs from the paper: s is kept with the layer (16 bits per input), where the paper divides the layer before
by it, so that every linear layer of every family can be scaled; s has mean 1, so that 16-bit factors do not
overflow; a block's residual is taken after its factors are rounded to 16 bits, so that the next block
corrects the rounding too. Without calibration data s is 1. Signs of a row fill whole bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.budget.trace import has_data
from modicum.core.errors import UserError
from modicum.model.linear import LinearShape, check_rank
from modicum.model.linear._elastic import Elastic
from modicum.model.linear._quantised import QuantisedForm

CLAIM = {
    "figure": "any size to the megabyte, on a par with or better than quantisation, most at extreme ratios",
    "where": "abstract",
    "scale": "Llama 2, 3 and 3.1, 7B to 70B",
}
#: Of the small rank that small matrices need (16 factors of 16 bits are 5 bits per entry at width 96).
SWEEP = {"rank": (2,), "blocks": (3,), "bits": (2, 3)}
FACTOR = torch.float16


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: int = 16  # k, singular vectors kept of the magnitudes; fewer for narrow layers
    blocks: int = 16  # n, iterations: blocks made for each layer
    bits: float | None = None  # of the blocks kept, per weight, over all layers together; None: all blocks

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 1 <= self.blocks <= 64:
            raise ValueError(f"blocks={self.blocks} must be from 1 to 64")
        if self.bits is not None and not (math.isfinite(self.bits) and self.bits > 0):
            raise ValueError(f"bits={self.bits} must be a positive number, or None for all blocks")


TOY = Config(rank=4, blocks=8)


class BitStack(QuantisedForm, Elastic):
    """State: `scale` and `block_0`, `block_1`, ... A block is one run of bytes, as it lies in a file:
    U (O, k) and V (k, I) in float16, then the signs (O, ceil(I / 8)), bit 0 first, set for positive."""

    provides = frozenset({"adapter_base", "calibration", "elastic", "embedding", "fit", "merge"})
    stored = frozenset({"scale"})
    fit_error = 0.03
    config: Config
    scale: Tensor

    def __init__(self, config: Config, shape: LinearShape):
        check_rank("bitstack", config.rank, shape)
        super().__init__(config, shape)
        self.row_bytes = -(-shape.in_features // 8)
        self.register_buffer("scale", self._empty(shape.in_features, dtype=torch.bfloat16))
        self.set_layout({"blocks": config.blocks})

    def block_nbytes(self, i: int) -> int:
        factors = self.config.rank * (self.in_features + self.out_features)
        return factors * FACTOR.itemsize + self.out_features * self.row_bytes

    # --- the weight ---------------------------------------------------------------------------------

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        scale_I = torch.ones(self.in_features, device=self.scale.device)
        if calibration_NI is not None:
            norm_I = calibration_NI.to(self.scale.device, torch.float32).norm(dim=0)
            if has_data(norm_I) and not (bool(norm_I.isfinite().all()) and bool(norm_I.any())):
                raise UserError("the calibration inputs are all zero, or hold NaN or infinite values; give others")
            scale_I = norm_I / norm_I.mean() + 1e-3  # a channel that was silent keeps some weight
        self.scale.copy_(scale_I)
        left_OI = weight_OI.to(self.scale.device, torch.float32) * self.scale.float()
        for i in range(self.loaded):
            factors = [x.to(FACTOR).flatten().view(torch.uint8) for x in magnitudes(left_OI.abs(), self.config.rank)]
            block = torch.cat([*factors, pack(left_OI >= 0).flatten()])
            getattr(self, f"block_{i}").copy_(block)
            left_OI = left_OI - self._block(i)

    def block_weight(self, i: int) -> Tensor:
        """What block i adds to the weight: float32 (O, I)."""
        return self._block(i) / self.scale.float()

    def _parts(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """U (O, k), V (k, I), signs (O, bytes) of block i: views of its bytes."""
        block: Tensor = getattr(self, f"block_{i}")
        rank, out, into = self.config.rank, self.out_features, self.in_features
        first, second = 2 * rank * out, 2 * rank * (out + into)
        return (
            block[:first].view(FACTOR).view(out, rank),
            block[first:second].view(FACTOR).view(rank, into),
            block[second:].view(out, self.row_bytes),
        )

    def _block(self, i: int, rows: Tensor | None = None) -> Tensor:
        """Sigma_i * U_i V_i in float32: all rows, or those named."""
        U, V, signs = self._parts(i)
        if rows is not None:
            U, signs = U[rows], signs[rows]
        magnitude = U.float() @ V.float()
        return torch.where(unpack(signs, self.in_features), magnitude, -magnitude)

    def _sum(self, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.partial_sum is not None:
            return (self.partial_sum if rows is None else self.partial_sum[rows]).to(dtype)
        n_rows = self.out_features if rows is None else rows.numel()
        total = torch.zeros(n_rows, self.in_features, device=self.scale.device)
        for i in range(self.loaded):
            total += self._block(i, rows)
        return (total / self.scale.float()).to(dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self._sum(None, dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self._sum(index.flatten(), self.dtype).view(*index.shape, self.in_features)


def magnitudes(size_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U_Ok, V_kI), the truncated SVD of a matrix with the singular values shared evenly by both factors.

    By the eigenvectors of the smaller Gram matrix, in float64: several times as fast as a full SVD.
    """
    size = size_OI.double()
    tall = size.shape[0] >= size.shape[1]
    values, vectors = torch.linalg.eigh(size.T @ size if tall else size @ size.T)
    near = vectors[:, -rank:]  # ascending: the last are the largest
    sigma = values[-rank:].clamp_min(0).sqrt()
    # A Gram matrix tells singular values apart down to 1e-8 of the largest; what is below is rounding.
    root = torch.where(sigma > 1e-7 * sigma[-1], sigma, 0).sqrt()
    far = size @ near if tall else size.T @ near  # the other side's vectors times sigma
    far = torch.where(root > 0, far / root, 0)
    near = near * root
    U, Vt = (far, near) if tall else (near, far)
    return U.float(), Vt.T.float().contiguous()


def pack(bits_OI: Tensor) -> Tensor:
    """Booleans (O, I) to bytes (O, ceil(I / 8)); input 8 b + j is bit j of byte b."""
    out, into = bits_OI.shape
    padded = bits_OI.new_zeros(out, -(-into // 8) * 8)
    padded[:, :into] = bits_OI
    weights = 2 ** torch.arange(8, device=bits_OI.device, dtype=torch.int32)
    return (padded.view(out, -1, 8) * weights).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, into: int) -> Tensor:
    """Inverse of `pack`."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).bool().flatten(1)[:, :into]
