"""dataset-decomposition: every row is a part of one document, of a length that is a power of two; batches differ in it.

Each document is cut into powers of two, the largest first, and what is left below the shortest is dropped. Parts of one
length form a bucket. A batch takes rows of one bucket, as many as make its tokens, so that no attention and no padding
is spent across documents, and short documents never pay for long rows.

    n = 2^i1 + 2^i2 + ... (+ rest < shortest),  i1 > i2 > ...       b / 2^i rows of 2^i tokens a batch
    P(bucket i) proportional to odds_i x tokens left in it           odds 2^(k-1) : ... : 2 : 1 from short to long

A cycle is so many tokens of text, and ends when no bucket fills a batch any more; what is left goes into the next one.
By the odds short rows come first in a cycle and long ones last, time after time, which is the curriculum.

Pouransari et al. 2024, arXiv:2405.13226, sections 3 and 4. Departs from the paper: the buckets are those of a window of
the stream (`cycle`) and not of the whole corpus, so nothing is stored beside it; odds weigh the tokens that are left in
a bucket, not those it began with; documents longer than a row are cut to rows first. Learning rates that were tuned on
one length are not the best here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modicum.core.errors import UserError
from modicum.data.batch import Span
from modicum.data.packings import Packing

ODDS = ("grow-p2", "grow-linear", "grow-p100", "natural", "uniform")
CLAIM = {
    "figure": "the accuracy of concatenation in a sixth of the training time",
    "where": "Figure 1",
    "scale": "410M parameters, 1.1T tokens, context 8,192",
}

SWEEP = ("shortest=16,cycle=100000", "shortest=16,cycle=100000,odds=natural")


@dataclass(frozen=True, kw_only=True)
class Config:
    shortest: int = 256  # tokens of a row, a power of two; what is left of a document below it is dropped
    odds: str = "grow-p2"  # of buckets: grow-p2, grow-linear, grow-p100, natural, uniform
    cycle: int = 2_000_000  # tokens of text that are decomposed together

    def __post_init__(self) -> None:
        if self.shortest < 1 or self.shortest & (self.shortest - 1):
            raise ValueError(f"shortest={self.shortest} must be a power of two")
        if self.odds not in ODDS:
            raise ValueError(f"odds={self.odds} must be one of {', '.join(ODDS)}")
        if self.cycle < 1:
            raise ValueError(f"cycle={self.cycle} must be at least 1 token")


TOY = Config(shortest=1, cycle=200)


class DatasetDecomposition(Packing):
    """No span shares its row: plain causal attention stays within a document."""

    config: Config
    masks_documents = False
    conflicts = frozenset({"order/in-context-pretraining"})

    def fill(self, draw: Callable[[], Span | None], pending: list[Span], longest: int, tokens: int) -> None:
        if longest & (longest - 1) or longest < self.config.shortest:
            raise UserError(
                f"dataset-decomposition needs rows of a power of two, at least shortest={self.config.shortest}; a "
                f"sequence length of {longest} is none: ask for 1024, 2048, ..."
            )
        while not full(pending, tokens):
            drawn = 0
            while drawn < self.config.cycle:
                span = draw()
                if span is None:
                    return
                drawn += span.length
                pending += decomposed(span, self.config.shortest, longest)

    def row_length(self, longest: int, progress: float, pending: Sequence[Span] = (), tokens: int = 0) -> int:
        size = Counter[int]()
        for span in pending:
            size[span.length] += span.length
        ready = sorted(n for n in size if size[n] >= tokens) or sorted(size, key=lambda n: -size[n])[:1]
        if not ready:
            return longest
        weights = [
            w * (size[n] if self.config.odds != "uniform" else 1)
            for n, w in zip(ready, self._odds(len(ready)), strict=True)
        ]
        at = _uniform(pending, progress) * sum(weights)
        for n, weight in zip(ready, weights, strict=True):
            at -= weight
            if at < 0:
                return n
        return ready[-1]

    def _odds(self, k: int) -> list[float]:
        """Of k buckets, from short to long."""
        if self.config.odds in ("natural", "uniform"):
            return [1.0] * k
        if self.config.odds == "grow-linear":
            return [float(k - i) for i in range(k)]
        return [(100.0 if self.config.odds == "grow-p100" else 2.0) ** (k - 1 - i) for i in range(k)]

    def row(self, draw: Callable[[], Span | None], pending: list[Span], length: int) -> list[Span]:
        """The oldest part of `length` tokens. None is left of it when the data has ended: the next batch has others."""
        while (at := next((i for i, span in enumerate(pending) if span.length == length), None)) is None:
            span = draw()
            if span is None:
                return []
            pending += decomposed(span, self.config.shortest, length)
        return [pending.pop(at)]


def decomposed(span: Span, shortest: int, longest: int) -> list[Span]:
    """The parts of a span: whole rows of `longest`, then one for each binary digit of the rest, large ones first."""
    parts: list[Span] = []
    while span.length >= shortest:
        size = min(1 << (span.length.bit_length() - 1), longest)
        if span.length == size:
            return [*parts, span]
        part, span = span.split(size)
        parts.append(part)
    return parts


def full(pending: Sequence[Span], tokens: int) -> bool:
    """Whether some bucket fills a batch."""
    size = Counter[int]()
    for span in pending:
        size[span.length] += span.length
    return any(n >= tokens for n in size.values())


def _uniform(pending: Sequence[Span], progress: float) -> float:
    """A number in [0, 1) by what is waiting and how far the run is: the same again after a restart."""
    first = pending[0]
    name = f"{first.domain}/{first.document}/{first.start}/{len(pending)}/{progress:.9f}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64
