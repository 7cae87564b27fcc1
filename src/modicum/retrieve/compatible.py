"""A projection of a new encoder's vectors into the space of an old one, so that an index need not be made again.

Shape letters: N texts, D width of the new encoder, E of the old one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def procrustes(new_ND: np.ndarray, old_NE: np.ndarray) -> np.ndarray:
    """W_ED = U V^T of old^T new = U S V^T: of all with orthonormal rows or columns it has the least |new W^T - old|."""
    u_EK, _, v_KD = np.linalg.svd(old_NE.astype(np.float64).T @ new_ND.astype(np.float64), full_matrices=False)
    w_ED: np.ndarray = u_EK @ v_KD
    return w_ED


class Projection(nn.Module):
    """unit(W x + U tanh(V x)); U starts at 0, so that it begins as the linear W."""

    def __init__(self, new: int, old: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(new, old, bias=False)
        self.down, self.up = nn.Linear(new, hidden), nn.Linear(hidden, old)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        x_ND = F.normalize(x_ND, dim=-1)
        return F.normalize(self.linear(x_ND) + self.up(torch.tanh(self.down(x_ND))), dim=-1)

    def begin(self, w_ED: np.ndarray) -> None:
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(w_ED))


def negative_flips(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Fraction of the queries that were right and became wrong."""
    return float(np.mean([b and not a for b, a in zip(before, after, strict=True)]))
