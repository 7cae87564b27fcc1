"""average-params: one law for dense and sparse runs, in the number of parameters averaged over training.

    L = E + A / n^alpha + B / D^beta,        n = (1 / D) * integral of N(t) dt over the tokens t of the run

A model that is pruned during training (or grown) has no one size. With its average size over tokens (equal steps: over
steps) in place of the parameters, the two-power law holds for dense and pruned runs with the same constants, and
training takes about 6 n D FLOPs. Rows give `average_parameters`; those without it are dense, and their `parameters`
stand in, so on a table of dense runs the fit is `chinchilla`'s to the bit. `average` computes it from a schedule of
sizes.

Jin et al. 2025, arXiv:2501.12486 (ICLR 2025). Departs: estimation, priors and intervals are `chinchilla`'s; the
paper's convention of which parameters count was not found, so count the same ones (embeddings or not) for dense and
sparse rows. Weights that a mask sets to zero do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.core.errors import UserError
from modicum.laws.forms.chinchilla import Chinchilla
from modicum.laws.forms.chinchilla import Config as PlainConfig

CLAIM = {"figure": "one law for dense and sparse pretraining", "where": "abstract", "scale": "80 pruning schedules"}


@dataclass(frozen=True, kw_only=True)
class Config(PlainConfig):
    """Knobs as of chinchilla."""


TOY = Config(draws=300)


class AverageParams(Chinchilla):
    config: Config
    columns = ("average_parameters", "tokens")
    size = "average_parameters"

    def toy_points(self, n: int = 6, scale: float = 1.0) -> dict[str, np.ndarray]:
        points = super().toy_points(n, scale)
        pruned = np.where(np.arange(n * n) % 2 == 0, 1.0, 0.6)  # every other run keeps 60% on average
        return points | {"average_parameters": points["parameters"] * pruned}


def average(tokens: Sequence[float], parameters: Sequence[float]) -> float:
    """Average size of a run whose parameters stood at `parameters[i]` from `tokens[i]` on, to the last of `tokens`.

    The last size is that of the finished model and has no weight: the run ends there. Raises UserError for tokens that
    do not rise.
    """
    at, sizes = np.asarray(tokens, float), np.asarray(parameters, float)
    if at.shape != sizes.shape or len(at) < 2 or (np.diff(at) <= 0).any():
        raise UserError("a schedule of sizes needs as many rising token counts as sizes, at least two of them")
    return float((sizes[:-1] * np.diff(at)).sum() / (at[-1] - at[0]))
