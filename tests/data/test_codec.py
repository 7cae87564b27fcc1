"""Codecs against their definitions: coding by exhaustion, exact tables, and what a reset is worth."""

from __future__ import annotations

import numpy as np
import pytest

from modicum.core.choice import make_config
from modicum.core.errors import UserError
from modicum.data.codecs import ac, neural_compression
from modicum.data.codecs._conformance import TEXTS
from modicum.data.codecs._counts import TOTAL, Counts

SAMPLE = [t.encode() for t in TEXTS * 5]


def test_tables_are_the_blend_of_counts() -> None:
    counts = Counts(3).fit(SAMPLE)
    for context in (b"", b"t", b"th", b"the", b"xyz", b"qth", b" vi"):
        blend = [TOTAL // 256] * 256
        for k in range(len(context) + 1):
            suffix = context[len(context) - k :]
            after = [t[i + k] for t in SAMPLE for i in range(len(t) - k) if t[i : i + k] == suffix]
            if not after:
                break
            n, kinds = len(after), len(set(after))
            blend = [max(1, (after.count(b) * TOTAL + kinds * blend[b]) // (n + kinds)) for b in range(256)]
            blend[blend.index(max(blend))] += TOTAL - sum(blend)
        table = counts.table(context)
        assert np.diff(table).tolist() == blend and (table[0], table[-1]) == (0, TOTAL)


def test_every_code_is_one_window_and_every_window_one_code() -> None:
    codec = neural_compression.EqualInformation(neural_compression.Config(window=12, bits=12, order=2))
    codec.counts.fit(SAMPLE)
    windows = [codec.read(code) for code in range(1 << 12)]
    assert len(set(windows)) == 1 << 12 and {bytes([b]) for b in range(256)} <= {w[:1] for w in windows}
    for code, window in enumerate(windows):
        ((again, size),) = codec.windows(window)
        assert (again, size) == (code, len(window))


def test_windows_hold_as_many_bytes_as_fit() -> None:
    codec = neural_compression.EqualInformation(neural_compression.Config(window=16, bits=16))
    codec.fit(TEXTS * 5)
    data = TEXTS[0].encode()
    at = 0
    for code, size in codec.windows(data):
        low, high = 0, 1 << 16
        for i in range(size):
            context = data[at : at + i]
            table = codec.counts.table(context).tolist()
            m, one = (high - low - 1, 0) if context else (high - low - 256, 1)
            start = low + (1 if context else 0)
            byte = data[at + i]
            low, high = (start + one * (byte + j) + m * table[byte + j] // TOTAL for j in (0, 1))
            assert high > low
        assert code == low
        if at + size < len(data):  # the next byte has no code left
            table, byte, m = codec.counts.table(data[at : at + size]).tolist(), data[at + size], high - low - 1
            assert m * table[byte] // TOTAL == m * table[byte + 1] // TOTAL
        at += size
    assert at == len(data)


def test_a_window_means_the_same_wherever_it_stands() -> None:
    codec = neural_compression.EqualInformation(neural_compression.Config(window=16, bits=16)).fit(TEXTS * 5)
    ids = codec.encode(TEXTS[1])
    starts = np.cumsum([0, *(n for _, n in codec.windows(TEXTS[1].encode()))])
    assert len(ids) >= 3
    for k in range(1, len(ids)):
        assert codec.encode(TEXTS[1].encode()[starts[k] :].decode()) == ids[k:]


def test_arithmetic_codes_cost_what_the_model_says() -> None:
    codec = ac.Arithmetic(ac.Config()).fit(TEXTS * 5)
    text = (TEXTS[2] + TEXTS[0]) * 4
    data = text.encode()
    tables = [codec.counts.table(data[max(0, i - 5) : i]) for i in range(len(data))]
    nats = -sum(np.log2((t[b + 1] - t[b]) / TOTAL) for t, b in zip(tables, data, strict=True))
    bits = 8 * len(codec.encode(text))
    assert nats <= bits <= nats + 8 * 2 + 2 + 8  # its length, the end, the last token
    assert codec.decode(codec.encode(text)) == text


@pytest.mark.parametrize("knobs", [{"window": 8}, {"window": 16, "bits": 5}, {"order": 9}, {"window": 40, "bits": 8}])
def test_impossible_windows_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(UserError):
        make_config(neural_compression.Config, knobs, "codec/neural-compression")
