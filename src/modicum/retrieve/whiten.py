"""Centring and whitening of vectors in closed form.

Shape letters: N vectors, E dimensions before, D after.

    mean, C = mean and covariance of the vectors          C = U diag(s) U^T, s falling
    y = diag((s + floor)^(-power / 2)) U^T (x - mean)     the first `remove` columns of U left out

`dims` keeps the leading ones only. power 0 rotates only, 1 whitens fully: every direction then has equal weight
(Su et al. 2021, arXiv:2103.15316). `remove` drops the components common to all vectors (Mu and Viswanath
2018, arXiv:1702.01417). The floor, `shrink` times the mean of s, keeps directions that are only noise from
being amplified, as with fewer vectors than dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from modicum.core.errors import UserError


class Whitener:
    def __init__(self, *, power: float = 1.0, remove: int = 0, shrink: float = 1e-2, dims: int | None = None):
        if not 0 <= power <= 1:
            raise UserError(f"whiten={power} is not between 0 (off) and 1 (full)")
        self.power, self.remove, self.shrink, self.dims = power, remove, shrink, dims
        self.mean_E = np.empty(0, np.float32)
        self.map_ED = np.empty((0, 0), np.float32)

    def fit(self, blocks: Iterable[np.ndarray]) -> Whitener:
        """From blocks of x_NE, read once; float64 sums, E * E of them."""
        n, sum_E, sum_EE = 0, None, None
        for x_NE in blocks:
            if sum_E is None or sum_EE is None:
                shift_E = x_NE.mean(axis=0, dtype=np.float64)  # sums about a point near the mean lose no digits
                sum_E, sum_EE = np.zeros(x_NE.shape[1]), np.zeros((x_NE.shape[1], x_NE.shape[1]))
            centred_NE = x_NE - shift_E
            n += len(x_NE)
            sum_E += centred_NE.sum(axis=0)
            sum_EE += centred_NE.T @ centred_NE
        if sum_E is None or sum_EE is None:
            raise UserError("there is nothing to fit the encoder on; give at least one passage")
        covariance_EE = sum_EE / n - np.outer(sum_E / n, sum_E / n)
        values, vectors = np.linalg.eigh(covariance_EE)
        leading = slice(self.remove, None if self.dims is None else self.remove + self.dims)
        values, vectors = np.maximum(values[::-1], 0)[leading], vectors[:, ::-1][:, leading]
        if not len(values):
            raise UserError(f"remove={self.remove} leaves none of {len(sum_E)} dimensions; remove fewer")
        floor = max(self.shrink * values.mean(), 1e-12)  # vectors that are all alike become zeros, not noise
        self.mean_E = (shift_E + sum_E / n).astype(np.float32)
        self.map_ED = (vectors * (values + floor) ** (-self.power / 2)).astype(np.float32)
        return self

    def __call__(self, x_NE: np.ndarray) -> np.ndarray:
        if not len(self.mean_E):
            raise UserError("the encoder is not fitted yet; call fit with pooled vectors of the passages first")
        return np.asarray((x_NE - self.mean_E) @ self.map_ED, np.float32)

    def state(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean_E, "map": self.map_ED}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self.mean_E, self.map_ED = state["mean"], state["map"]
