"""bytes: one token for each byte of UTF-8.

    ids = utf8(text)

No paper. Departs from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from modicum.data.codecs import Codec, to_bytes, to_text


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Bytes(Codec):
    @property
    def vocab_size(self) -> int:
        return 256

    def encode(self, text: str) -> list[int]:
        return list(to_bytes(text))

    def decode(self, ids: Iterable[int]) -> str:
        return to_text(bytes(ids))
