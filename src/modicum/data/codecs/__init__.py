"""port codec: how text becomes the tokens that a language model learns.

A method is constructed as `cls(config)` and fitted once on a sample of text. `decode(encode(text))` is the text for any
text, whether or not anything like it was in the sample; lone surrogates are kept as UTF-8 keeps them with
`surrogatepass`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from modicum.core.registry import Method

BASELINE = "bytes"


class Codec(Method):
    """Base class: fill `fit`, `encode`, `decode`, `vocab_size`, and `state` with `set_state`."""

    def __init__(self, config: Any):
        self.config = config

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 ... vocab_size - 1."""
        raise NotImplementedError

    def fit(self, texts: Iterable[str]) -> Codec:
        """Learn from texts; the same texts give the same codec. Returns itself."""
        return self

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `encode`'s ids; other ids, as a model may write them, give some text."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        """What was fitted, as arrays for `numpy.savez`."""
        return {}

    def set_state(self, state: Mapping[str, np.ndarray]) -> Codec:
        """Take what `state` gave, here or in another process. Returns itself."""
        return self


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def to_text(data: bytes) -> str:
    """The text of bytes; what is no UTF-8 is replaced."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")
