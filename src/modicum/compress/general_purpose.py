"""General-purpose compressors on the text that a language model is scored on, as baselines.

A model that predicts text with b bits per byte could store it in b bits per byte by arithmetic coding
(Deletang et al. 2023, arXiv:2309.10668), so xz and zstd on the same bytes are baselines for it.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator
from typing import Any

from modicum.core.errors import UserError

DICTIONARY_BYTES = 112_640  # the default of the zstd command line tool
_SAMPLE, _SAMPLES = 4096, 8192


def compressor_bits(
    text: Iterable[str] | bytes, train: Iterable[str] | None = None, *, dictionary_bytes: int = DICTIONARY_BYTES
) -> dict[str, float]:
    """Bits per byte of `text`, as one stream, under xz -9, zstd -19, and zstd -19 with a dictionary.

    train: texts that the dictionary is trained on, as the model was; the dictionary is not counted among the
    compressed bytes, as the model is not. Without `train` there is no such entry. Keeps `text` in memory.
    """
    import zstandard

    data = text if isinstance(text, bytes) else b"\n".join(_encoded(text))
    if not data:
        raise UserError("there is no text to measure; give held-out documents")

    def bits(compressed: bytes) -> float:
        return 8 * len(compressed) / len(data)

    # As xz -9 does, but with tables for this much data instead of for 64 MiB; the output is as long.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(len(data), 4096), 64 << 20)}]
    bits_per_byte = {
        "xz -9": bits(lzma.compress(data, filters=filters)),
        "zstd -19": bits(zstandard.ZstdCompressor(level=19).compress(data)),
    }
    if train is not None:
        dictionary = _dictionary(train, dictionary_bytes)
        if dictionary is not None:
            packed = zstandard.ZstdCompressor(level=19, dict_data=dictionary).compress(data)
            bits_per_byte["zstd -19, dictionary"] = bits(packed)
    return bits_per_byte


def _encoded(texts: Iterable[str]) -> Iterator[bytes]:
    return (text.encode("utf-8", "surrogatepass") for text in texts)


def _dictionary(train: Iterable[str], size: int) -> Any:
    """A zstd dictionary from samples of the first texts, or None if there is too little text."""
    import zstandard

    samples: list[Any] = []
    for text in _encoded(train):
        samples += (text[i : i + _SAMPLE] for i in range(0, len(text), _SAMPLE))
        if len(samples) >= _SAMPLES:
            break
    try:
        return zstandard.train_dictionary(size, samples[:_SAMPLES], level=19)
    except zstandard.ZstdError:
        return None
