"""What must hold for any codec, on texts that it was fitted on and others."""

from __future__ import annotations

import numpy as np

from modicum.core import registry
from modicum.data.codecs import Codec

TEXTS = [
    "The river runs through the valley, and the village lies where the valley is widest.",
    "In the village there is a mill at the river; it has not ground corn for many years.\n",
    "Nobody remembers who built the bridge. It is said that it was here before the village was.",
]


def odd() -> list[str]:
    rng = np.random.default_rng(3)
    out = [
        "",
        "a",
        " ",
        "\n\n\t ",
        "\x00\x01\x7f",
        "\u00e9t\u00e9 \u4e00\u4e8c \U0001f600",
        "aaaa" * 100,
        "\ufffd",
        *TEXTS,
    ]
    out += ["".join(map(chr, rng.integers(1, 0xD000, n))) for n in (1, 7, 60)]
    out += ["".join(rng.choice(list("abc .\n"), n)) for n in (1, 2, 3, 50, 400)]
    return out


def _fitted(key: str) -> Codec:
    loaded = registry.load("codec", key)
    codec: Codec = loaded.cls(getattr(loaded.module, "TOY", loaded.config()))
    return codec.fit(TEXTS * 20)


def check_round_trip(key: str) -> None:
    """Any text comes back, and every id lies in the vocabulary."""
    codec = _fitted(key)
    for text in odd():
        ids = codec.encode(text)
        assert all(0 <= i < codec.vocab_size for i in ids), f"{key}: ids outside the vocabulary"
        assert codec.decode(ids) == text, f"{key}: {text[:30]!r} comes back as {codec.decode(ids)[:30]!r}"


def check_same_again(key: str) -> None:
    """Fitted twice on the same texts it is the same; so it is from its state."""
    first, second = _fitted(key), _fitted(key)
    loaded = registry.load("codec", key)
    third = loaded.cls(first.config).set_state(first.state())
    for text in odd():
        assert first.encode(text) == second.encode(text) == third.encode(text), f"{key}: differs"
    assert third.vocab_size == first.vocab_size


def check_any_ids_decode(key: str) -> None:
    """What a model may write, ids in any order, is some text."""
    codec = _fitted(key)
    rng = np.random.default_rng(5)
    for n in (1, 2, 40):
        assert isinstance(codec.decode([int(i) for i in rng.integers(0, codec.vocab_size, n)]), str)
