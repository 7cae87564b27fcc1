"""o1-embedder: a language model writes what would answer a query, and embeds the query together with it.

    v(d) = unit(h at the last token of d<emb>)
    v(q) = unit(mean over k thoughts t of v(<query>q</query><thought>t</thought><emb>))        thoughts=0: q alone

Written thoughts bring the passage's words into the query's vector; they cost as many tokens of generation as they have,
for every query. Train the model with `thinking.fit` on queries with their passages and thoughts, of several written
ones the committee's choice (`thinking.vote`). Yan et al. 2025, arXiv:2502.07555, with the authors' code. Departs: the
markers are text, not new tokens, so that no rows are added to the vocabulary; every weight is trained, where the
authors use low-rank updates of 7B models; the average over thoughts is not published as such. A model of 135 M
parameters writes thoughts of little use; its vectors without them are the baseline to measure against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.core.errors import UserError
from modicum.core.files import read_json
from modicum.retrieve.encoders import Encoder, unit
from modicum.retrieve.thinking import FILE, Thinker

NOT_MEASURABLE = "it needs a model trained with thinking.fit on thoughts that a stronger model wrote"


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str  # a folder that Thinker.save left
    thoughts: Annotated[int, Field(ge=0)] = 1  # written for each query and averaged; 0: none
    most: Annotated[int, Field(ge=1)] = 64  # tokens of a thought
    temperature: Annotated[float, Field(gt=0)] = 0.7  # of all thoughts but the first, which is greedy
    batch: Annotated[int, Field(ge=1)] = 16  # texts of one forward pass


class O1Embedder(Encoder):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        folder = Path(config.model)
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} has no {FILE}; train a model with retrieve.thinking.fit and save it")
        self.thinker = Thinker.open(folder / "model", device, read_json(folder / FILE)["tokens"])

    def pool(self, texts: Sequence[str]) -> np.ndarray:
        return self.thinker.embed([self.thinker.passage(t) for t in texts], self.config.batch)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        c, t = self.config, self.thinker
        if not c.thoughts:
            return t.embed([t.row(q, None)[0] for q in texts], c.batch)
        written = [t.write(q, c.thoughts, c.most, c.temperature) for q in texts]
        rows = [t.row(q, thought)[0] for q, own in zip(texts, written, strict=True) for thought in own]
        vectors_ND = t.embed(rows, c.batch)
        return unit(vectors_ND.reshape(len(texts), c.thoughts, -1).mean(1)) if len(texts) else vectors_ND
