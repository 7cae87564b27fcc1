"""What compressors know of the inputs of a linear layer: sums over calibration tokens, never the tokens themselves.

Shapes: N tokens, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = frozenset({"gram", "squares", "magnitudes"})


@dataclass
class Statistics:
    """Sums over the rows of x_NI in float64; one that nobody asked for is None.

    gram_II: sum of x x^T; squares_I: of x^2; magnitudes_I: of |x|.
    """

    kinds: frozenset[str]
    count: int = 0
    gram_II: Tensor | None = None
    squares_I: Tensor | None = None
    magnitudes_I: Tensor | None = None

    @classmethod
    def of(cls, x_NI: Tensor, kinds: Collection[str] = KINDS) -> Statistics:
        """Of rows that are all there."""
        made = cls(frozenset(kinds))
        made.add(x_NI)
        return made

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Rows x (..., I). Products are summed in the dtype of x within one call, in float64 between calls."""
        x_NI = x.reshape(-1, x.shape[-1])
        self.count += x_NI.shape[0]
        if "gram" in self.kinds:
            self.gram_II = _plus(self.gram_II, x_NI.T @ x_NI)
        if "squares" in self.kinds:
            self.squares_I = _plus(self.squares_I, x_NI.double().square().sum(0))
        if "magnitudes" in self.kinds:
            self.magnitudes_I = _plus(self.magnitudes_I, x_NI.double().abs().sum(0))

    @property
    def gram(self) -> Tensor:
        """H = X X^T over the tokens (I, I)."""
        return _collected(self.gram_II, "gram")

    @property
    def norms(self) -> Tensor:
        """||x_i||_2 of each input over the tokens (I,)."""
        return _collected(self.squares_I, "squares").sqrt()

    @property
    def mean_square(self) -> Tensor:
        """E x_i^2 (I,)."""
        return _collected(self.squares_I, "squares") / self.count

    @property
    def mean_magnitude(self) -> Tensor:
        """E |x_i| (I,)."""
        return _collected(self.magnitudes_I, "magnitudes") / self.count


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part.double() if total is None else total.add_(part)


def _collected(value: Tensor | None, kind: str) -> Tensor:
    if value is None:
        raise ValueError(f"the statistic {kind!r} was not collected; name it in the class's `needs`")
    return value
