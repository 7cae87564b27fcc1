"""hashed-words: words hashed to 64 signed coordinates; an encoder for tests, real if humble.

Counts what it pools.
"""

import re
from dataclasses import dataclass

import numpy as np

from modicum.core import registry
from modicum.retrieve.encoders import Encoder, unit


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class HashedWords(Encoder):
    def __init__(self, config=Config(), device="cpu"):
        super().__init__(config, device)
        self.pooled = 0

    def pool(self, texts):
        self.pooled += len(texts)
        out = np.zeros((len(texts), 64), np.float32)
        for i, text in enumerate(texts):
            for word in re.findall("[a-z]+", text.lower()):
                h = sum(ord(c) * 31**j for j, c in enumerate(word))
                out[i, h % 64] += 1 if h // 64 % 2 else -1
        return out

    def finish(self, pooled_NE):
        return unit(pooled_NE)


INFO = registry.MethodInfo("encoder", "hashed-words", "for tests", __name__, None)
