"""A dirty pool: clean documents with planted ones among them, each marked with what is wrong with it.

    exact        a document once more, with other spaces
    near         a document once more, one word in a hundred replaced
    boilerplate  what stands around texts on the web: menus, notices, counters, without a sentence
    foreign      a document in a language that the held-out side does not speak (its letters under a permutation)
    messy        a document as careless programs write it: decomposed Unicode, other line ends, trailing spaces, and
                 control characters; it is clean again once that is undone

Everything follows from the seed. Documents longer than `LONGEST` bytes are not planted, as few would weigh too much.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence

import numpy as np

from modicum.data.document import Document

LONGEST = 20_000
VOWELS, CONSONANTS = "aeiouy", "bcdfghjklmnpqrstvwxz"
PHRASES = (
    "Home | Products | Support | Contact us",
    "Accept all cookies",
    "Manage preferences",
    "Subscribe to our newsletter",
    "Share on Facebook / Twitter / LinkedIn",
    "Read more >>",
    "Page {n} of {m}",
    "Copyright (c) {y} All rights reserved.",
    "Terms of service - Privacy policy",
    "{n} comments, {m} views",
    "Log in | Register",
    "Back to top",
    "Loading...",
    "[ advertisement ]",
    "Last updated: {y}-{k:02d}-{k:02d}",
    "=" * 40,
)


def plant(clean: Sequence[Document], fraction: float, seed: int) -> list[Document]:
    """`clean` with planted documents among them, in a random order.

    share: bytes of each kind of planted documents, of the bytes of the clean ones; messy ones take a clean one's place.
    A planted document's meta says its kind (`planted`), and of a copy, which document it is one `of`.
    """
    rng = np.random.default_rng([seed, 17])
    wanted = fraction * sum(d.nbytes for d in clean)
    short = [d for d in clean if d.nbytes <= LONGEST]
    foreign = _alphabet(rng)
    messy = {d.id: _messy(d, rng) for d in _some(short, wanted, rng)}
    short = [d for d in short if d.id not in messy]
    out = [messy.get(d.id, d) for d in clean]
    for kind in ("exact", "near", "boilerplate", "foreign"):
        for number, d in enumerate(_some(short, wanted, rng)):
            if kind == "exact":
                text = d.text.replace("\n", " \n") + "\n"
            elif kind == "near":
                text = _near(d.text, rng)
            elif kind == "boilerplate":
                text = _boilerplate(len(d.text), rng)
            else:
                text = d.text.translate(foreign)
            meta = d.meta | {"planted": kind} | ({"of": d.id} if kind in ("exact", "near") else {})
            out.append(dataclasses.replace(d, id=f"{d.id}~{kind}{number}", text=text, meta=meta))
    return [out[int(i)] for i in rng.permutation(len(out))]


def _some(documents: Sequence[Document], wanted: float, rng: np.random.Generator) -> list[Document]:
    """Documents at random until they have so many bytes."""
    order = [documents[int(i)] for i in rng.permutation(len(documents))]
    sizes = np.cumsum([d.nbytes for d in order])
    return order[: int(np.searchsorted(sizes, wanted)) + 1]


def _near(text: str, rng: np.random.Generator) -> str:
    words = text.split(" ")
    for at in np.flatnonzero(rng.random(len(words)) < 0.01):
        words[at] = words[int(rng.integers(len(words)))]
    return " ".join(words)


def _boilerplate(length: int, rng: np.random.Generator) -> str:
    lines = []
    for at in rng.integers(len(PHRASES), size=max(10, length // 25)):
        n, year, month = rng.integers(1, 99), rng.integers(1999, 2025), int(rng.integers(1, 13))
        lines.append(PHRASES[at].format(n=n, m=100 * n + month, y=year, k=month))
    return "\n".join(lines)


def _alphabet(rng: np.random.Generator) -> dict[int, int]:
    """Each letter's stand-in: vowels for vowels, so that words can still be spoken."""
    pairs: dict[str, str] = {}
    for letters in (VOWELS, CONSONANTS):
        pairs |= dict(zip(letters, map(str, rng.permutation(list(letters))), strict=True))
    return {ord(k): ord(v) for k, v in (pairs | {k.upper(): v.upper() for k, v in pairs.items()}).items()}


def _messy(document: Document, rng: np.random.Generator) -> Document:
    lines = [line + " " * int(rng.integers(4)) for line in unicodedata.normalize("NFD", document.text).split("\n")]
    text = "\x0b\x07" + "\r\n".join(lines)
    return dataclasses.replace(document, text=text, meta=document.meta | {"planted": "messy"})


def recovered(pool: Sequence[Document], kept: Sequence[Document]) -> dict[str, float]:
    """What became of the pool, by `kept`, the documents that are left: shares of the documents of each kind.

    found_KIND: planted documents that are gone. Of a pair of duplicates either may go, so a planted copy counts as
    found when it or the document that it is a copy of is gone. found_messy: those that are clean again, or gone.
    lost_clean: other documents that are gone without a copy left.
    """
    left = {d.id for d in kept}
    untidy = {d.id for d in kept if _untidy(d.text)}
    copies: dict[str, set[str]] = {}
    for d in pool:
        if "of" in d.meta:
            copies.setdefault(d.meta["of"], set()).add(d.id)
    marks: dict[str, list[bool]] = {}
    for d in pool:
        kind = d.meta.get("planted", "")
        if kind == "messy":
            gone = d.id not in untidy
        elif kind:
            gone = d.id not in left or d.meta.get("of", d.id) not in left
        else:
            gone = not ({d.id} | copies.get(d.id, set())) & left
        marks.setdefault(kind, []).append(gone)
    return {f"found_{k}" if k else "lost_clean": sum(v) / len(v) for k, v in sorted(marks.items())}


def _untidy(text: str) -> bool:
    return "\r" in text or "\x07" in text or " \n" in text or not unicodedata.is_normalized("NFC", text)
