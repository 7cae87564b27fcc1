"""random: keep documents at random: the arm that a selection has to beat at equal tokens.

    keep d  if  hash(seed, id of d) / 2^64 < keep

Which documents stay depends on their ids alone, so that a larger `keep` gives a superset and every other step may come
before or after. No paper: the control of every data-selection experiment. Departs from nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from modicum.data.document import Document, Drop
from modicum.data.steps import Step


@dataclass(frozen=True, kw_only=True)
class Config:
    keep: float = 0.1  # share of the documents, and on average of the text
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a fraction above 0, at most 1")


TOY = Config(keep=0.5)


class Random(Step):
    config: Config
    relative = True

    def each(self, document: Document) -> Iterable[Document | Drop]:
        name = f"{self.config.seed}/{document.id}".encode("utf-8", "surrogatepass")
        drawn = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") / 2**64
        if drawn < self.config.keep:
            yield document
        else:
            yield Drop(document.id, "not-drawn", f"{drawn:.3f}, kept below {self.config.keep:g}")
