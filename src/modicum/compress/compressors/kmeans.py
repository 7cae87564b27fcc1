"""kmeans: the values of each matrix clustered, and each weight replaced by its cluster's mean.

    min over t, q of sum_oi (W_oi - t[q_oi])^2,   2^b entries of t per matrix or per group of rows

by Lloyd's iteration (1982), which in one dimension is exact and quick. Weight only, after training, without text: the
clustering of Han, Mao, Dally 2015 (arXiv:1510.00149, section 3) without retraining, and the baseline of `edkm`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.compress.compressors import Compressor, Statistics
from modicum.compress.compressors._palette import Indices, PaletteConfig
from modicum.model.linear.palette import means, nearest


@dataclass(frozen=True, kw_only=True)
class Config(PaletteConfig):
    pass


SWEEP = ("bits=3", "bits=4")


class KMeans(Compressor):
    config: Config

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Indices:
        return clustered(weight_OI, self.config)


def clustered(weight_OI: Tensor, config: PaletteConfig) -> Indices:
    """Of each group of rows the k-means table, and the nearest entries."""
    codes, tables = [], []
    for part in weight_OI.split(config.rows or len(weight_OI)):
        table_K = means(part, 2**config.bits).to(config.dtype)
        codes.append(nearest(part, table_K.to(weight_OI.dtype)))
        tables.append(table_K)
    return Indices(torch.cat(codes), torch.stack(tables), config)
