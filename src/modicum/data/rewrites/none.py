"""none: every document as it is.

    rewrite(d) = [d]

No paper. Departs from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document
from modicum.data.rewrites import Rewriter, Rounds


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Nothing(Rewriter):
    generates = False

    def rewrite(self, document: Document, rng: np.random.Generator) -> Rounds:
        return [document]
        yield
