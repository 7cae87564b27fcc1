"""port rewrite: what a text generator, or a rule, makes of a document.

A method is constructed as `cls(config)`. `rewrite(document, rng)` is a generator function: it yields the requests of a
round and is sent their replies, as often as it likes, and returns documents (the original among them, where it stays)
and drops. A method without a generator yields nothing. `data.rewriting` runs it, many documents at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any, ClassVar

import numpy as np

from modicum.core.registry import Method
from modicum.data.document import Document, Drop
from modicum.data.replies import Reply, Request

BASELINE = "none"

Rounds = Generator[list[Request], list[Reply], list[Document | Drop]]


class Rewriter(Method):
    """Base class: fill `rewrite`.

    generates: it needs a generator. keeps_original: the original may stay where nothing can be made of it. Documents
    made of one have ids `ORIGINAL#...` and its origin, so that all fall on one side of the held-out split.
    """

    generates: ClassVar[bool] = True
    keeps_original: ClassVar[bool] = True

    def __init__(self, config: Any):
        self.config = config

    @property
    def key(self) -> str:
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        """Rounds of requests; returns what becomes of the document. Pure in the document, `rng` and the replies."""
        raise NotImplementedError

    def made(self, document: Document, text: str, name: str = "", domain: str = "rewritten") -> Document:
        """A document made of another: of a domain of its own, DOMAIN-rewritten, that a mixture can weigh."""
        return dataclasses.replace(
            document,
            id=f"{document.id}#{self.key}{name}",
            text=text,
            domain=f"{document.domain}-{domain}" if domain else document.domain,
            meta={k: v for k, v in document.meta.items() if k != "quality"}
            | {"part_of": document.origin, "rewritten": self.key},
        )


def sampling(config: Any) -> dict[str, float]:
    """The knobs of a config that say how tokens are chosen."""
    return {"temperature": config.temperature, "top_p": config.top_p}
