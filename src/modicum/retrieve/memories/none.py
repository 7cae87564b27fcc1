"""none: the reader answers from its weights alone.

    prefix = nothing

What any memory must beat; documents are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modicum.retrieve.memories import Example, Memory, prompt
from modicum.retrieve.prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class NoMemory(Memory):
    config: Config

    def compress(self, texts: Sequence[str]) -> Tensor:
        return torch.empty(len(texts), 0, 0)

    def aggregate(self, questions: Sequence[str], entries_SNW: Tensor) -> Prefix | None:
        return None

    def loss(self, examples: Sequence[Example], rng: np.random.Generator) -> Tensor:
        return self.reader.losses(None, [prompt(e.question) for e in examples], [e.answer for e in examples]).mean()
