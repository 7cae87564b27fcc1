"""neural-compression: windows of equal information: as many bytes as a small model codes in W bits, then a fresh start.

    window(b_1 ... b_n)    n largest with  codes(b_1 ... b_n) >= 1
    codes()                = 2^W
    codes(b_1 ... b_{i+1}) = floor(C_{i+1} m / T) - floor(C_i m / T),  m = codes(b_1 ... b_i) - 1,  T the sum of counts

A window is the number of its code, W bits, cut into tokens of `bits`. Coder *and* model start anew at each window, so
that a window means the same wherever it stands: that is what a second model can learn, as it cannot where nothing
resets (method `ac`). Windows and tokens of 16 bits: one token, one chunk of text.

Lester et al. 2024, "Training LLMs over neurally compressed text" (arXiv:2404.03626), sections 3.2 to 3.4. Departs from
it: the first model is one of counts in integers over five bytes, in place of a transformer of 3M parameters, so that
both directions agree bit by bit; of each interval one code is set apart, which says that the window ends there, in
place of padding that a decoder has to see through; the empty window has none, and all 256 bytes have a code in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from modicum.data.codecs import to_bytes, to_text
from modicum.data.codecs._counts import TOTAL, Counted, check_order

SWEEP = ("window=16,bits=8", "window=12,bits=12")
CLAIM = {
    "figure": "0.94 bits per byte with windows of 16 bits, better than bytes, behind SentencePiece",
    "where": "section 5, figure 4",
    "scale": "2B parameters, 26B tokens; at 25M parameters the gap to SentencePiece is larger",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    window: int = 16  # bits
    bits: int = 16  # of a token: its vocabulary is 2^bits
    order: int = 5  # bytes of context

    def __post_init__(self) -> None:
        check_order(self.order)
        if not 9 <= self.window <= 32:
            raise ValueError(f"window={self.window} lies between 9 and 32 bits: every byte has to fit an empty one")
        if not 1 <= self.bits <= 16 or self.window % self.bits:
            raise ValueError(f"bits={self.bits} has to divide window={self.window}, and is at most 16")


TOY = Config(window=16, bits=8)


class EqualInformation(Counted):
    config: Config

    def child(self, context: bytes, low: int, high: int, byte: int) -> tuple[int, int]:
        """Codes of the window `context` plus `byte`, of those, `low` to `high`, of `context`; none if it does not
        fit."""
        table_V = self.counts.table(context)
        if context:
            low, spare = low + 1, 0  # the first says that the window ends here
        else:
            spare = 256  # each byte has one of these, and a part of the others
        m = high - low - spare
        first = low + (byte if spare else 0) + m * int(table_V[byte]) // TOTAL
        last = low + (byte + 1 if spare else 0) + m * int(table_V[byte + 1]) // TOTAL
        return first, last

    def windows(self, data: bytes) -> Iterable[tuple[int, int]]:
        """(code, bytes) of each window of `data`."""
        at, full = 0, 1 << self.config.window
        while at < len(data):
            low, high, end = 0, full, at
            while end < len(data):
                first, last = self.child(data[at:end], low, high, data[end])
                if last <= first:
                    break
                low, high, end = first, last, end + 1
            yield low, end - at
            at = end

    def encode(self, text: str) -> list[int]:
        bits, mask = self.config.bits, (1 << self.config.bits) - 1
        shifts = range(self.config.window - bits, -1, -bits)
        return [(code >> shift) & mask for code, _ in self.windows(to_bytes(text)) for shift in shifts]

    def decode(self, ids: Iterable[int]) -> str:
        data, code, size = bytearray(), 0, 0
        for token in ids:
            code, size = (code << self.config.bits) | int(token), size + self.config.bits
            if size == self.config.window:
                data += self.read(code)
                code = size = 0
        return to_text(bytes(data))

    def read(self, code: int) -> bytes:
        """The bytes of one window."""
        low, high, data = 0, 1 << self.config.window, b""
        while not data or code > low:
            table_V = self.counts.table(data)
            if data:
                m, first_V = high - low - 1, low + 1 + (high - low - 1) * table_V // TOTAL
            else:
                m = high - low - 256
                first_V = low + np.arange(257) + m * table_V // TOTAL
            byte = int(np.searchsorted(first_V, code, side="right")) - 1
            low, high = int(first_V[byte]), int(first_V[byte + 1])
            data += bytes([byte])
        return data
