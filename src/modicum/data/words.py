"""Hashes of words and word n-grams, for comparing texts; the same on every machine."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

PRIME = 0x100000001B3  # odd, so that it has an inverse modulo 2^64
TABLE = 0x3000
# Ranges whose characters are words by themselves: kana, Han; beyond the basic plane, more Han.
SINGLE = ((0x3040, 0xABFF), (0x20000, 0x3FFFF))


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def combine(columns_NK: np.ndarray) -> np.ndarray:
    """One uint64 for each row: a polynomial in its mixed columns, modulo 2^64."""
    total = np.zeros(len(columns_NK), np.uint64)
    for k in range(columns_NK.shape[1]):
        total = total * np.uint64(PRIME) + mix(columns_NK[:, k] + np.uint64(k + 1))
    return mix(total)


def ngrams(words_N: np.ndarray, n: int) -> np.ndarray:
    """uint64 [N - n + 1] hashes of the n-grams of word hashes."""
    return combine(np.lib.stride_tricks.sliding_window_view(words_N, n))


def word_hashes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hash, int64 length in characters) of each word, case folded.

    A word is a run of letters, digits, marks and underscores; of kana and Han, one character.
    """
    hashes, lengths, _ = _words(text.lower())
    return hashes, lengths


def word_hashes_of(texts: Sequence[str]) -> list[np.ndarray]:
    """The hashes of `word_hashes`, of several texts at once: short ones cost most by themselves."""
    lowered = [text.lower() for text in texts]
    hashes, _, starts = _words("\n".join(lowered))
    after = np.cumsum([len(text) + 1 for text in lowered])
    cuts = np.searchsorted(starts, after[:-1])
    return np.split(hashes, cuts)


def _words(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hash, length, index of the first character) of each word of a text in lower case."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    if len(points) == 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    single = np.zeros(len(points), bool)
    for low, high in SINGLE:
        single |= (points >= low) & (points <= high)
    word = _word_table()[np.minimum(points, TABLE - 1)] & ((points < TABLE) | (points >= 0x3040))
    # A word starts at a word character after none, and at and after every character that is one by itself.
    after_none = np.concatenate([[True], ~word[:-1]])
    apart = single | np.concatenate([[False], single[:-1]])
    starts = np.flatnonzero(word & (after_none | apart))
    if len(starts) == 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), starts
    ends = np.append(starts[1:], len(points))
    # H(word) = sum of c_i p^(i - start), from prefix sums of c_i p^i; other characters add nothing.
    power, inverse = powers(max(1 << 12, 1 << (len(points) - 1).bit_length()))
    values = np.where(word, points.astype(np.uint64) + np.uint64(1), np.uint64(0))
    prefix = np.concatenate([[np.uint64(0)], np.cumsum(values * power[: len(points)], dtype=np.uint64)])
    letters = np.concatenate([[0], np.cumsum(word)])
    return mix((prefix[ends] - prefix[starts]) * inverse[starts]), letters[ends] - letters[starts], starts


@cache
def powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """p^i and p^-i modulo 2^64 for i < count."""
    first = np.ones(1, np.uint64)
    return tuple(
        np.cumprod(np.concatenate([first, np.full(count - 1, p, np.uint64)]), dtype=np.uint64)
        for p in (PRIME, pow(PRIME, -1, 1 << 64))
    )  # type: ignore[return-value]


@cache
def _word_table() -> np.ndarray:
    """Which of the first characters belong to words; of those above, all do."""
    return np.array(
        [chr(i).isalnum() or chr(i) == "_" or unicodedata.category(chr(i))[0] == "M" for i in range(TABLE - 1)] + [True]
    )
