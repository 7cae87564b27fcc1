"""A small model of bytes in integers: counts of the bytes after each context, blended over contexts of 0 to K bytes.

    f_k(b) = max(1, floor((n_k(b) T + t_k f_{k-1}(b)) / (n_k + t_k)))        f_{-1}(b) = T / 256, T = 2^16

n_k(b): how often b followed the last k bytes in the sample, n_k their sum, t_k how many different ones did: the weights
of Witten and Bell (1991, method C). What rounding leaves over goes to the most frequent byte, so that every table adds
up to T. Everything is an integer, in one order: tables are equal bit by bit wherever they are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.data.codecs import Codec, to_bytes

TOTAL = 1 << 16
MOST_ORDER = 6  # a context and the byte after it have to fit 64 bits
TABLES = 1 << 15  # that are kept, 2 kB each


class Counts:
    """order: bytes of the longest context."""

    def __init__(self, order: int):
        self.order = order
        self.grams: list[tuple[np.ndarray, np.ndarray]] = []  # by context length: sorted (context, byte), counts
        self._tables: dict[bytes, np.ndarray] = {}

    def fit(self, texts: Iterable[bytes]) -> Counts:
        data = [np.frombuffer(text, np.uint8).astype(np.uint64) for text in texts if text]
        self.grams, self._tables = [], {}
        for k in range(self.order + 1):
            rows = []
            for x in data:
                if len(x) > k:
                    gram = np.zeros(len(x) - k, np.uint64)
                    for j in range(k + 1):
                        gram = (gram << np.uint64(8)) | x[j : len(x) - k + j]
                    rows.append(gram)
            keys, counts = np.unique(np.concatenate(rows or [np.zeros(0, np.uint64)]), return_counts=True)
            self.grams.append((keys, counts.astype(np.int64)))
        return self

    def table(self, context: bytes) -> np.ndarray:
        """int64 [257]: what comes before each byte after `context`; every byte gets at least 1 of `TOTAL`."""
        if not self.grams:
            raise UserError("the codec was not fitted; call fit with some texts")
        context = context[-self.order :] if self.order else b""
        known = self._tables.get(context)
        if known is not None:
            return known
        frequency_V = np.full(256, TOTAL // 256, np.int64)
        for k in range(len(context) + 1):
            keys, counts = self.grams[k]
            prefix = int.from_bytes(context[len(context) - k :], "big") << 8
            low, high = np.searchsorted(keys, np.array([prefix, prefix + 255], np.uint64), side="left")
            high += int(high < len(keys) and int(keys[high]) == prefix + 255)
            if high <= low:
                break  # a longer context was not seen either
            seen, n = (keys[low:high] & np.uint64(255)).astype(np.int64), counts[low:high]
            total, kinds = int(n.sum()), len(n)
            blended_V = frequency_V * kinds
            blended_V[seen] += n * TOTAL
            frequency_V = np.maximum(blended_V // (total + kinds), 1)
            frequency_V[int(np.argmax(frequency_V))] += TOTAL - int(frequency_V.sum())
        table_V = np.concatenate([[0], np.cumsum(frequency_V)])
        if len(self._tables) >= TABLES:
            self._tables.clear()
        self._tables[context] = table_V
        return table_V

    def state(self) -> dict[str, np.ndarray]:
        return {f"{what}{k}": x for k, gram in enumerate(self.grams) for what, x in zip("gn", gram, strict=True)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> Counts:
        self.grams = [(state[f"g{k}"], state[f"n{k}"]) for k in range(len(state) // 2)]
        self.order, self._tables = len(self.grams) - 1, {}
        return self


def check_order(order: int) -> None:
    if not 0 <= order <= MOST_ORDER:
        raise ValueError(f"order={order} lies between 0 and {MOST_ORDER}")


class Counted(Codec):
    """A codec that codes with `Counts`: its config has `order`, and `bits` of a token."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.counts = Counts(config.order)

    @property
    def vocab_size(self) -> int:
        return 1 << int(self.config.bits)

    def fit(self, texts: Iterable[str]) -> Codec:
        self.counts.fit(map(to_bytes, texts))
        return self

    def state(self) -> dict[str, np.ndarray]:
        return self.counts.state()

    def set_state(self, state: Mapping[str, np.ndarray]) -> Codec:
        self.counts.set_state(state)
        return self
