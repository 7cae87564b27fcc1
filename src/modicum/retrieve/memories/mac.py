"""mac: documents amortised to a few vectors each, read together by cross-attention from the question.

    entry(d)   = N vectors: learnt queries over the token states of an encoder, and an MLP with a skip for each
    read(q)    = blocks of cross-attention from the question's N vectors to all S N vectors of the bank, no positions
    prefix(q)  = expand(read(q)): `virtual` keys and values of every layer of the frozen reader
    L          = cross-entropy of the answer after prefix(q), the batch's documents being the bank

No search chooses documents: the attention does. In training a random `lift` of the documents gets gradients, the
others are encoded without a graph, so that a bank may be larger than memory for gradients allows. A large bank is read
by `windows` of so many documents, whose results are read again. Tack et al. 2024 (NeurIPS), arXiv:2403.04317, section
3, with the authors' code. Departs: the amortisation network is a learnt pooling of a frozen sentence encoder's token
states instead of a fine-tuned T5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.retrieve.encoders import make_encoder
from modicum.retrieve.memories import Example, Memory, prompt
from modicum.retrieve.memories._aggregate import Aggregator, Pooler
from modicum.retrieve.prefix import FrozenReader, Prefix


@dataclass(frozen=True, kw_only=True)
class Config:
    encoder: str = "minilm"  # gives token states of documents and questions; it is not trained
    vectors: Annotated[int, Field(ge=1)] = 12  # of an entry
    width: Annotated[int, Field(ge=1)] = 256  # of a vector
    blocks: Annotated[int, Field(ge=1)] = 4  # of cross-attention
    heads: Annotated[int, Field(ge=1)] = 8
    virtual: Annotated[int, Field(ge=1)] = 2  # keys, and values, of a layer
    lift: Annotated[float, Field(gt=0, le=1)] = 1.0  # documents of a batch that get gradients, as a fraction
    windows: tuple[int, ...] = (16, 32)  # documents read together, by level; () reads all at once

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if any(w < 2 for w in self.windows):
            raise ValueError(f"windows={self.windows} must hold numbers of documents from 2 on")


class Mac(Memory):
    config: Config

    def __init__(self, config: Any, reader: FrozenReader):
        super().__init__(config, reader)
        self.encoder = make_encoder(config.encoder)
        states = self.encoder.tokens(["width"])[0].shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.ModuleDict(
                {
                    "document": Pooler(states, config.vectors, config.width, config.heads),
                    "question": Pooler(states, config.vectors, config.width, config.heads),
                    "read": Aggregator(config.width, config.blocks, config.heads, reader.shapes, config.virtual),
                }
            ).to(reader.model.device)
        self.net.eval()

    def compress(self, texts: Sequence[str]) -> Tensor:
        assert isinstance(self.net, nn.ModuleDict)
        entries: Tensor = self.net["document"](self.encoder.tokens(texts))
        return entries

    def aggregate(self, questions: Sequence[str], entries_SNW: Tensor) -> Prefix:
        assert isinstance(self.net, nn.ModuleDict)
        condition_QNW = self.net["question"](self.encoder.tokens(questions, "query"))
        aggregator: Any = self.net["read"]
        made: Prefix = aggregator.prefix(aggregator.windowed(condition_QNW, entries_SNW, self.config.windows))
        return made

    def entries(self, documents: Sequence[str], rng: np.random.Generator) -> Tensor:
        """Of a batch, in training: those of a random `lift` of the documents carry gradients."""
        count = max(1, round(self.config.lift * len(documents)))
        lifted = set(rng.permutation(len(documents))[:count].tolist())
        with torch.no_grad():
            rest = [d for n, d in enumerate(documents) if n not in lifted]
            plain = list(self.compress(rest)) if rest else []
        taught = list(self.compress([d for n, d in enumerate(documents) if n in lifted]))
        return torch.stack([(taught if n in lifted else plain).pop(0) for n in range(len(documents))])

    def loss(self, examples: Sequence[Example], rng: np.random.Generator) -> Tensor:
        documents = list(dict.fromkeys(e.document for e in examples))
        made = self.aggregate([e.question for e in examples], self.entries(documents, rng))
        return self.reader.losses(made, [prompt(e.question) for e in examples], [e.answer for e in examples]).mean()
