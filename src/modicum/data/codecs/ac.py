"""ac: arithmetic coding of a whole text by a small model of bytes; the control of neural-compression.

    interval(b | context) = [low + range C(b) / T, low + range C(b + 1) / T)

The bits that the interval's ends have in common are written out, in tokens of `bits`. Nothing resets, so that what a
token means depends on all that came before it: a second model learns next to nothing from such tokens (Lester et al.
2024, arXiv:2404.03626, section 5).

Witten, Neal and Cleary 1987, "Arithmetic coding for data compression". Departs from it: the text's length in bytes is
written first, in seven bits a token and a mark, in place of an end symbol; the model is the integer one of `_counts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from modicum.data.codecs import to_bytes, to_text
from modicum.data.codecs._counts import TOTAL, Counted, check_order

HALF, QUARTER, FULL = 1 << 31, 1 << 30, (1 << 32) - 1


@dataclass(frozen=True, kw_only=True)
class Config:
    bits: int = 8  # of a token
    order: int = 5  # bytes of context

    def __post_init__(self) -> None:
        check_order(self.order)
        if not 4 <= self.bits <= 16:
            raise ValueError(f"bits={self.bits} lies between 4 and 16")


class Arithmetic(Counted):
    config: Config

    def encode(self, text: str) -> list[int]:
        data = to_bytes(text)
        bits = [int(b) for b in format(len(data), "b")]
        groups = -(-len(bits) // 7)
        bits = [0] * (7 * groups - len(bits)) + bits
        out = [b for g in range(groups) for b in [int(g < groups - 1), *bits[7 * g : 7 * g + 7]]]
        low, high, pending = 0, FULL, 0

        def put(bit: int) -> None:
            nonlocal pending
            out.append(bit)
            out.extend([1 - bit] * pending)
            pending = 0

        for at, byte in enumerate(data):
            table_V = self.counts.table(data[max(0, at - self.config.order) : at])
            width = high - low + 1
            low, high = low + width * int(table_V[byte]) // TOTAL, low + width * int(table_V[byte + 1]) // TOTAL - 1
            while True:
                if high < HALF:
                    put(0)
                elif low >= HALF:
                    put(1)
                    low, high = low - HALF, high - HALF
                elif low >= QUARTER and high < HALF + QUARTER:
                    pending += 1
                    low, high = low - QUARTER, high - QUARTER
                else:
                    break
                low, high = 2 * low, 2 * high + 1
        pending += 1
        put(int(low >= QUARTER))
        size = self.config.bits
        out += [0] * (-len(out) % size)
        return [int("".join(map(str, out[at : at + size])), 2) for at in range(0, len(out), size)]

    def decode(self, ids: Iterable[int]) -> str:
        stream = "".join(format(int(i), f"0{self.config.bits}b") for i in ids)
        length, at, more = 0, 0, 1
        while more and at < len(stream):
            more = int(stream[at])
            length = (length << 7) | int(stream[at + 1 : at + 8] or "0", 2)
            at += 8
        length = min(length, 8 * len(stream) * TOTAL)
        value = int(stream[at : at + 32].ljust(32, "0"), 2)
        at += 32
        low, high, data = 0, FULL, bytearray()
        while len(data) < length and at < len(stream) + 64:  # far past its end there is nothing to read
            table_V = self.counts.table(bytes(data[-self.config.order :]) if self.config.order else b"")
            width = high - low + 1
            target = ((value - low + 1) * TOTAL - 1) // width
            byte = int(np.searchsorted(table_V, target, side="right")) - 1
            data.append(byte)
            low, high = low + width * int(table_V[byte]) // TOTAL, low + width * int(table_V[byte + 1]) // TOTAL - 1
            while True:
                if high < HALF:
                    pass
                elif low >= HALF:
                    low, high, value = low - HALF, high - HALF, value - HALF
                elif low >= QUARTER and high < HALF + QUARTER:
                    low, high, value = low - QUARTER, high - QUARTER, value - QUARTER
                else:
                    break
                low, high = 2 * low, 2 * high + 1
                value = 2 * value + (int(stream[at]) if at < len(stream) else 0)
                at += 1
        return to_text(bytes(data))
