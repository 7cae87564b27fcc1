"""What datastores of any size would have given, from one search of the largest: sample, clean and cut deep lists.

A list of the `deep` best of the whole store, of which each passage stays with probability p by a hash of its number, is
the list of a store that was sampled so, as long as k of it are left. Sampling and decontamination judge a passage
alone, so their order does not matter; near duplicates are dropped after sampling, since the copy that would stay may
not have been in the smaller store. Shao et al. 2024 (MassiveDS), arXiv:2407.12854, section 3 and appendix A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modicum.core.errors import UserError
from modicum.retrieve.feedback import Feedback
from modicum.retrieve.indexes import Hits

GRAM, OVERLAP, RUN = 13, 0.8, 32  # words of a gram, Jaccard similarity of near duplicates, words copied in a row


def lot(row: int, seed: int) -> float:
    """The number in [0, 1) that decides whether a passage is in a sampled store: the same for every query."""
    digest = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def sampled(rows: Sequence[int], fraction: float, seed: int) -> list[int]:
    """Those of a store of this fraction, in their order; a smaller fraction gives a subset of a larger one's."""
    return [r for r in rows if lot(int(r), seed) < fraction]


def grams(text: str, n: int = GRAM) -> frozenset[str]:
    """Runs of n words in lower case; a shorter text is one run."""
    words = text.lower().split()
    return frozenset(" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(len(a | b), 1)


def distinct(rows: Sequence[int], texts: Sequence[str], overlap: float = OVERLAP) -> list[int]:
    """Without near duplicates: the best-ranked of each group stays."""
    kept: list[tuple[int, frozenset[str]]] = []
    for row in rows:
        own = grams(texts[row])
        if not any(jaccard(own, other) > overlap for _, other in kept):
            kept.append((row, own))
    return [row for row, _ in kept]


def copied(text: str, target: str, run: int = RUN, overlap: float = OVERLAP) -> bool:
    """Whether a passage gives the target away: `run` words of it in a row, or nearly all of its grams."""
    if len(text.split()) >= run <= len(target.split()) and grams(text, run) & grams(target, run):
        return True
    return jaccard(grams(text), grams(target)) > overlap


@dataclass(frozen=True)
class Cut:
    """rows: the best of each query, fewer than k where the deep list ran out, which `shortfalls` counts."""

    rows: list[list[int]]
    shortfalls: int


def cut(
    deep: Hits,
    texts: Sequence[str],
    k: int,
    *,
    fraction: float = 1.0,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    overlap: float = OVERLAP,
) -> Cut:
    """The k best of each query in a store of this fraction; targets: what must not be given away, for each query."""
    rows, short = [], 0
    for q, ids in enumerate(deep.ids_QK):
        chosen = sampled(ids[ids >= 0].tolist(), fraction, seed)
        if targets is not None:
            chosen = [r for r in chosen if not copied(texts[r], targets[q], overlap=overlap)]
        chosen = distinct(chosen, texts, overlap) if overlap < 1 else chosen
        short += len(chosen) < k
        rows.append(chosen[:k])
    return Cut(rows, short)


@dataclass(frozen=True)
class Point:
    """A store of `fraction` of the passages: mean cross-entropy of the targets, nats a token. shortfalls: queries with
    fewer than k passages left, whose loss is that of a shallower list."""

    fraction: float
    passages: int
    loss: float
    shortfalls: int


def scaling(
    texts: Sequence[str],
    windows: Sequence[tuple[str, str]],
    rank: Callable[[list[str], int], Hits],
    reader: Feedback,
    fractions: Sequence[float],
    *,
    k: int = 3,
    deep: int = 100,
    seed: int = 0,
    decontaminate: bool = True,
    overlap: float = OVERLAP,
) -> list[Point]:
    """Loss against the size of the datastore, the first point without any.

    windows: (first half, second half) of held-out texts; the first is the query and stays in the prompt, the loss is
    of the second half alone, so all points are of the same tokens. The best passage is next to the text.
    """
    if not windows or any(not a.strip() or not b.strip() for a, b in windows):
        raise UserError("a window needs two halves, the query and what is predicted; leave short texts out")
    wrong = [f for f in fractions if not 0 < f <= 1]
    if wrong:
        raise UserError(f"fraction {wrong[0]} is not in (0, 1]; the point without a datastore is always made")
    heads, tails = [a for a, _ in windows], [b for _, b in windows]
    deep_hits = rank(heads, deep)
    points = [Point(0.0, 0, _loss(reader, heads, tails), 0)]
    for fraction in sorted(fractions):
        targets = tails if decontaminate else None
        one = cut(deep_hits, texts, k, fraction=fraction, seed=seed, targets=targets, overlap=overlap)
        prompts = [
            "\n\n".join([*(texts[r] for r in rows[::-1]), head]) for rows, head in zip(one.rows, heads, strict=True)
        ]
        size = len(sampled(range(len(texts)), fraction, seed))
        points.append(Point(fraction, size, _loss(reader, prompts, tails), one.shortfalls))
    return points


def _loss(reader: Feedback, prompts: Sequence[str], targets: Sequence[str]) -> float:
    # What joins the two is no part of what is predicted.
    return float(-reader.log_likelihoods([p + " " for p in prompts], targets, mean=True).mean())
