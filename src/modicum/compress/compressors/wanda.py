"""wanda: the weights set to zero that are small for the inputs they meet, row by row.

    S_ij = |W_ij| ||x_j||_2,   of each output row the p I entries of least S become zero

or n of every m inputs of a row (`pattern`). No other weight changes. Comparing within a row, not over the matrix, is
what makes it work on language models. Inputs are those of the model whose earlier blocks are pruned. Sun, Liu, Bair,
Kolter 2023, arXiv:2306.11695, sections 3 and 4.3. What is written is a plain model with zeros in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.compress.compressors import Compressor, Statistics
from modicum.compress.compressors._masks import MaskConfig, smallest, smallest_of


@dataclass(frozen=True, kw_only=True)
class Config(MaskConfig):
    pass


CLAIM = {"figure": "at 50%, WikiText2 perplexity 7.26 of LLaMA-7B against 17.29 by magnitude and 7.22 by SparseGPT",
         "where": "section 4.2", "scale": "7B parameters"}  # fmt: skip
SWEEP = ("sparsity=0.5", "pattern=2of4")


class Wanda(Compressor):
    requires = frozenset({"calibration_text"})
    leaves = "weights"
    needs: ClassVar[frozenset[str]] = frozenset({"squares"})
    config: Config

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Tensor:
        score_OI = weight_OI.abs() * statistics.norms.to(weight_OI.dtype)
        pattern = self.config.pattern
        mask_OI = smallest_of(score_OI, self.config) if pattern else smallest(score_OI, self.config.sparsity)
        return weight_OI.masked_fill(mask_OI, 0)
