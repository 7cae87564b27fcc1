"""lsa: latent semantic analysis of the passages; no model.

A text's term counts, weighted by idf, are projected onto the main directions of the passages' counts:

    y = x W        X = U diag(s) W^T over the passages, the `dims` largest s

Deerwester et al. 1990 (JASIS 41); terms are those of BM25, and W comes from a randomized SVD (see `data.latent`).
Departs: vectors are scaled to length 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.data.latent import Latent
from modicum.retrieve.encoders import Encoder, unit


@dataclass(frozen=True, kw_only=True)
class Config:
    dims: Annotated[int, Field(ge=1)] = 512  # directions kept; fewer where the passages have fewer


TOY = Config(dims=4)


class LSA(Encoder):
    config: Config
    fitted = True

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        self.latent = Latent(config.dims)

    def count(self, texts: Iterable[str]) -> None:
        self.latent.fit(texts)

    def pool(self, texts: Sequence[str]) -> np.ndarray:
        return self.latent(texts)

    def finish(self, pooled_NE: np.ndarray) -> np.ndarray:
        return unit(pooled_NE)

    def state(self) -> dict[str, np.ndarray]:
        return self.latent.state()

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self.latent.set_state(state)
