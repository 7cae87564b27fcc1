"""connected-adapters: a frozen encoder, adapters inside its layers, and a path of adapters beside them to the loss.

    inside:  y <- y + U s(D y)            after attention and after the feed-forward network of every layer
    beside:  a_{l+1} = a_l + U'_l s(D'_l h_l),   layer l + 1 reads h_l + a_{l+1}

Adapters that are scattered over frozen layers are trained through them; the state a connects each layer's trained
modules with the next, so that gradients reach the lowest without a frozen layer in between. U and U' start at 0. The
loss is that of the trainer `base`. `inside=0` or `beside=0` leaves a path out, for comparison at equal parameters.

Ma et al. 2022 (CIKM), arXiv:2208.09847 (Inside and Aside Adapters). The wiring of the published variants was not at
hand: the recurrence above is the idea of their abstract. Departs: dual encoders alone, no cross-encoder. The folder
keeps the encoder as `base` and the adapters beside it; `sentence-transformers:model=FOLDER` opens both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from modicum.core.registry import build
from modicum.retrieve.connected import BASE, ConnectedAdapters
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.student import Student
from modicum.retrieve.trainers import Batch, RetrieverTrainer


@dataclass(frozen=True, kw_only=True)
class Config:
    base: Literal["in-batch", "m2-bert"] = "in-batch"  # the trainer whose loss is taken
    inside: Annotated[int, Field(ge=0)] = 8  # bottleneck of the adapters inside; 0: none
    beside: Annotated[int, Field(ge=0)] = 16  # of those beside; 0: none

    def __post_init__(self) -> None:
        if not self.inside and not self.beside:
            raise ValueError("inside=0 and beside=0 leave nothing to train; give one of them a bottleneck")


class Connected(RetrieverTrainer):
    config: Config
    unit = True

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.base: RetrieverTrainer = build("trainer", config.base, pairs)
        self._student: Student | None = None

    def prepare(self, student: Student) -> None:
        if self._student is student:
            return
        student.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapters = ConnectedAdapters(student.width, student.depth, self.config.inside, self.config.beside)
        adapters.to(next(student.parameters()).device).attach(student.model)
        self.heads, self._student = adapters, student

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        return self.base.on_vectors(queries_BD, positives_BD, negatives_BD, batch)

    def settle(self, student: Student, folder: Path) -> None:
        assert isinstance(self.heads, ConnectedAdapters)
        student.save(folder / BASE)
        self.heads.save(folder)
