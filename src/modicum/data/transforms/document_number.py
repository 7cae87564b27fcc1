"""document-number: each token carries the number of its document, for who keeps something by document.

    extras["document"][b, t] = 1 + first[domain] + document      0 where no document stands (padding, inserted text)

Numbers go through the domains in alphabetical order. They are float32, as all extras are, and so exact up to 16.7
million documents; more are refused. Brought along by the order `seta`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.core.errors import UserError
from modicum.data.batch import Span, Tokens
from modicum.data.shards import Documents
from modicum.data.transforms import Position, Source, Transform

MOST = 1 << 24
NOT_MEASURABLE = "it changes no token: it says which document each one is of"


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class DocumentNumber(Transform):
    config: Config

    def __init__(self, config: Config, source: Source):
        super().__init__(config, source)
        self.first = first_numbers(source.documents)

    def apply(self, tokens: Tokens, span: Span, at: Position) -> Tokens:
        number = 1 + self.first[span.domain] + span.document
        extras = {**tokens.extras, "document": np.full(len(tokens.tokens_N), number, np.float32)}
        return Tokens(tokens.tokens_N, tokens.targets_N, extras)


def first_numbers(documents: Documents) -> dict[str, int]:
    """How many documents stand before each domain's. Raises `UserError` for too many."""
    counts = {d: documents.documents(d) for d in sorted(documents.domains)}
    if (total := sum(counts.values())) >= MOST:
        raise UserError(f"{total} documents have no exact number in float32; at most {MOST} have")
    ends = np.cumsum([0, *counts.values()])
    return {d: int(n) for d, n in zip(counts, ends, strict=False)}
