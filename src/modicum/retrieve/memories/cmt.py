"""cmt: documents compressed by the reader itself, matched with the question in the same space, the best k read.

    entry(d)  = last states of N learnt memory tokens appended to d, by the reader with a low-rank update
    match     = cos(mean entry(q), mean entry(d)): the question is compressed as documents are
    prefix(q) = expand(cross-attention from entry(q) to the entries of the k best matches)
    L = NLL(answer | prefix) + rebuild NLL(document | prefix of its own entry)
        + max(0, margin + NLL(answer | own) - NLL(answer | another's)) + matching InfoNCE(match)

The update is active only while something is compressed, so the reader that answers is the frozen one. The selection
has no gradient: in training the own document is always among the k, and InfoNCE trains the matching. A document that
is not selected changes nothing in the answer, which tells this from `mac`. Entries must be written again when the
compressor is trained on. Li et al. 2024 (AAAI 2025), arXiv:2412.07393. The paper's section was not at hand: the form of
the memory-aware objective (the second and third terms), InfoNCE, the weights, N and k are choices made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.retrieve.memories import Example, Memory, prompt
from modicum.retrieve.memories._aggregate import Aggregator
from modicum.retrieve.prefix import FrozenReader, Prefix


@dataclass(frozen=True, kw_only=True)
class Config:
    vectors: Annotated[int, Field(ge=1)] = 8  # memory tokens: vectors of an entry
    k: Annotated[int, Field(ge=1)] = 4  # entries that are read
    rank: Annotated[int, Field(ge=1)] = 8  # of the update while compressing
    width: Annotated[int, Field(ge=1)] = 256  # of the network that reads
    blocks: Annotated[int, Field(ge=1)] = 2  # of cross-attention
    heads: Annotated[int, Field(ge=1)] = 8
    virtual: Annotated[int, Field(ge=1)] = 2  # keys, and values, of a layer
    rebuild: Annotated[float, Field(ge=0)] = 0.5  # weight of the document's own likelihood
    margin: Annotated[float, Field(ge=0)] = 0.5  # nats a token by which another's memory must be worse; 0: no such term
    matching: Annotated[float, Field(ge=0)] = 0.1  # weight of InfoNCE
    temperature: Annotated[float, Field(gt=0)] = 0.1  # of InfoNCE
    tokens: Annotated[int, Field(ge=8)] = 256  # a document is cut to so many

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")


class Compressor(nn.Module):
    """Memory tokens, and a low-rank update of every query and value projection: y + x A^T B^T, B starting at 0."""

    def __init__(self, model: Any, vectors: int, rank: int):
        super().__init__()
        width = model.config.width
        self.memory_ND = nn.Parameter(0.02 * torch.randn(vectors, width))
        targets = [getattr(layer.attention, name) for layer in model.layers for name in ("q", "v")]
        self.down = nn.ParameterList(torch.randn(rank, t.in_features) / t.in_features**0.5 for t in targets)
        self.up = nn.ParameterList(torch.zeros(t.out_features, rank) for t in targets)

    @contextmanager
    def active(self, model: Any) -> Iterator[None]:
        """While this lasts, the model's projections are updated and its last input states are the memory tokens."""
        count = len(self.memory_ND)

        def remember(_m: Any, _i: Any, x_BTD: Tensor) -> Tensor:
            memory_BND = self.memory_ND[None].expand(len(x_BTD), -1, -1).to(x_BTD)
            return torch.cat([x_BTD[:, :-count], memory_BND], 1)

        def update(n: int) -> Any:
            return lambda _m, inputs, y: y + inputs[0] @ self.down[n].T @ self.up[n].T

        targets = [getattr(layer.attention, name) for layer in model.layers for name in ("q", "v")]
        hooks = [model.embed.register_forward_hook(remember)]
        hooks += [t.register_forward_hook(update(n)) for n, t in enumerate(targets)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Cmt(Memory):
    config: Config

    def __init__(self, config: Any, reader: FrozenReader):
        super().__init__(config, reader)
        model = reader.model
        if not all(hasattr(layer.attention, "q") for layer in model.layers):
            raise UserError("cmt updates query projections, which this model does not have; give a model of attention")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.ModuleDict(
                {
                    "compress": Compressor(model, config.vectors, config.rank),
                    "into": nn.Sequential(
                        nn.LayerNorm(model.config.width), nn.Linear(model.config.width, config.width)
                    ),
                    "read": Aggregator(config.width, config.blocks, config.heads, reader.shapes, config.virtual),
                }
            ).to(model.device)
        self.net.eval()

    @property
    def _net(self) -> Any:
        return self.net

    def compress(self, texts: Sequence[str]) -> Tensor:
        t, model, count = self.reader.tokenizer, self.reader.model, self.config.vectors
        most = min(self.config.tokens, model.config.context_length - count - 1)
        rows = [[t.start_id, *ids[:most]] for ids in t.encode_batch(list(texts), specials=False)]
        width = max(map(len, rows)) + count
        tokens_BT = torch.full((len(rows), width), t.pad_id)
        mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
        for b, ids in enumerate(rows):  # padding on the left, so that memory tokens are the last of every row
            tokens_BT[b, width - count - len(ids) : width - count] = torch.tensor(ids)
            mask_BT[b, width - count - len(ids) :] = True
        with self._net["compress"].active(model):
            h_BTD = model.hidden(tokens_BT.to(model.device), mask_BT=mask_BT.to(model.device))
        entries: Tensor = h_BTD[:, -count:]
        return entries

    def select(self, query_QNW: Tensor, entries_SNW: Tensor, own_Q: Tensor | None = None) -> Tensor:
        """Numbers of the k best entries of each query, in rising order; `own_Q` is always among them."""
        cosine_QS = matches(query_QNW, entries_SNW).detach().clone()
        if own_Q is not None:
            cosine_QS[torch.arange(len(own_Q)), own_Q] = torch.inf
        k = min(self.config.k, len(entries_SNW))
        return cosine_QS.topk(k, dim=1).indices.sort(1).values

    def from_selected(self, query_QNW: Tensor, selected_QKNW: Tensor) -> Prefix:
        condition = self._net["into"](query_QNW)
        memory = self._net["into"](selected_QKNW).flatten(1, 2)
        made: Prefix = self._net["read"].prefix(self._net["read"].gathered(condition, memory))
        return made

    def aggregate(self, questions: Sequence[str], entries_SNW: Tensor) -> Prefix:
        query_QNW = self.compress(questions)
        return self.from_selected(query_QNW, entries_SNW[self.select(query_QNW, entries_SNW)])

    def loss(self, examples: Sequence[Example], rng: np.random.Generator) -> Tensor:
        c = self.config
        documents = list(dict.fromkeys(e.document for e in examples))
        own_Q = torch.tensor([documents.index(e.document) for e in examples], device=self.reader.model.device)
        entries_SNW = self.compress(documents)
        query_QNW = self.compress([e.question for e in examples])
        prompts, answers = [prompt(e.question) for e in examples], [e.answer for e in examples]
        selected = entries_SNW[self.select(query_QNW, entries_SNW, own_Q)]
        right_Q = self.reader.losses(self.from_selected(query_QNW, selected), prompts, answers)
        total = right_Q.mean()
        if c.rebuild:
            alone = self.from_selected(entries_SNW, entries_SNW[:, None])
            total = total + c.rebuild * self.reader.losses(alone, [""] * len(documents), documents, c.tokens).mean()
        if c.margin and len(documents) > 1:
            other_Q = (own_Q + int(rng.integers(1, len(documents)))) % len(documents)
            both = [self.from_selected(query_QNW, entries_SNW[at_Q][:, None]) for at_Q in (own_Q, other_Q)]
            with_own_Q, with_other_Q = (self.reader.losses(p, prompts, answers) for p in both)
            total = total + torch.relu(c.margin + with_own_Q - with_other_Q).mean()
        if c.matching:
            total = total + c.matching * F.cross_entropy(matches(query_QNW, entries_SNW) / c.temperature, own_Q)
        return total


def matches(query_QNW: Tensor, entries_SNW: Tensor) -> Tensor:
    """cosine_QS of the means of the vectors."""
    return F.normalize(query_QNW.mean(1), dim=-1) @ F.normalize(entries_SNW.mean(1), dim=-1).T
