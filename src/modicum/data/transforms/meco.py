"""meco: the source of each document before its text, until near the end of the run.

A corpus mixes sites that write very differently; a model that is told the site need not guess it from the text. The
metadata is read and never predicted: its targets are masked from the loss, and the last of its tokens predicts the
first of the text.

    until (1 - cooldown) of the run    start, "URL: en.wikipedia.org\\n\\n", t_1 ... t_n, eos
    after that                         start, t_1 ... t_n, eos

The metadata is what curation kept beside the tokens: the host of a document's URL, or else its folder; of a long
one the first half row. Documents must not see each other: packing concat:mask=true.

Gao et al. 2025, arXiv:2501.01956, section 2; the objective of the same name brings this along. Departs from the paper:
a chunk of a document that goes on in another row gets the metadata again, as it would otherwise be told nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.core.errors import UserError
from modicum.data.batch import NO_LOSS, Span, Tokens
from modicum.data.transforms import Position, Source, Transform

NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Config:
    cooldown: float = 0.1  # share of the run, at its end, on plain text

    def __post_init__(self) -> None:
        if not 0 <= self.cooldown < 1:
            raise ValueError(f"cooldown={self.cooldown} must be a fraction of the run, at least 0 and below 1")


class MetadataPrefix(Transform):
    config: Config
    requires = frozenset({"document_mask"})

    def __init__(self, config: Config, source: Source):
        super().__init__(config, source)
        if source.total is None or source.sequence_length < 2:
            raise UserError(
                "transform 'meco' needs the run's length (total=...), for its cool-down, and rows of two tokens or more"
            )
        for domain in source.documents.domains:  # what is missing is said before the run, not in it
            if source.documents.documents(domain):
                source.documents.metadata(domain, 0)

    def prefix(self, span: Span, at: Position) -> np.ndarray:
        if at.progress is None or at.progress >= 1 - self.config.cooldown:
            return NOTHING
        return self.source.documents.metadata(span.domain, span.document)[: self.source.sequence_length // 2]

    def added(self, span: Span, at: Position) -> int:
        return len(self.prefix(span, at))

    def apply(self, tokens: Tokens, span: Span, at: Position) -> Tokens:
        prefix = self.prefix(span, at)
        opening = int(span.start == 0)  # where the document begins, its start token stays in front of all
        return Tokens(
            np.concatenate([tokens.tokens_N[:opening], prefix, tokens.tokens_N[opening:]]),
            np.concatenate([np.full(len(prefix), NO_LOSS), tokens.targets_N]),
            {name: np.concatenate([np.zeros(len(prefix)), x]) for name, x in tokens.extras.items()},
        )
