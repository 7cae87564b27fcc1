"""rewrite: documents rewritten by a method of the port rewrite.

    out = union of rewriter(d) over d        `rewrite:by=wrap`, or {method: rewrite, by: {method: wrap, style: qa}}

The generator is that of the run (`--generator`). Replies are kept beside the curation as they come, so that a run that
was killed generates none of them again. A document that the generator fails on is named, stays as it is, and is tried
again when the same command is typed again. No paper; the methods name theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.data.document import Document, Drop
from modicum.data.replies import Replies
from modicum.data.rewriting import rewrite
from modicum.data.steps import Context, Step

NOT_MEASURABLE = "it does what its rewriter does; bench rewrite measures those"


@dataclass(frozen=True, kw_only=True)
class Config:
    by: Any = "none"  # a method of the port rewrite, with its knobs

    def __post_init__(self) -> None:
        Choice.parse("rewrite", self.by).config()


class Rewrite(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.rewriter = registry.build("rewrite", Choice.parse("rewrite", config.by))
        self.counts: Counter[str] = Counter()
        self.replies: Replies | None = None

    def open(self, context: Context) -> None:
        super().open(context)
        if self.rewriter.generates:
            generate, version = context.signals.generator()
            self.replies = Replies(generate, context.replies, version)

    def run(self, documents: Iterable[Document]) -> Iterator[Document | Drop]:
        yield from rewrite(self.rewriter, documents, self.replies, self.context.seed, self.counts)

    def close(self) -> dict[str, float]:
        if self.replies is not None:
            self.replies.close()
        return dict(self.counts)
