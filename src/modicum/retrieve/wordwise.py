"""Vectors of whole words with gates, for `colberter`: the heads above an encoder, and their score.

Shape letters: N texts, T tokens, W unique words of a text, D width of the encoder, C of the retrieval vector, E of a
word's vector, P passages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modicum.retrieve.student import States

NOTHING = -1000.0  # score of padding, below any word's


@dataclass
class Words:
    """N texts as one vector each, and one for each unique word; `gate_NW` is 1 where nothing is gated."""

    whole_NC: Tensor
    vectors_NWE: Tensor
    mask_NW: Tensor
    key_NW: Tensor  # int64: the same for the same word in any text
    gate_NW: Tensor


class WordHeads(nn.Module):
    """W_c and W_t, the gate, an optional second compression, and the weight of the two scores."""

    def __init__(self, width: int, whole: int, words: int, last: int | None, gates: bool):
        super().__init__()
        self.whole = nn.Linear(width, whole, bias=False)
        self.words = nn.Linear(width, words, bias=False)
        self.gate = nn.Linear(words, 1) if gates else None
        self.last = nn.Linear(words, last, bias=False) if last else None
        self.balance = nn.Parameter(torch.zeros(()))  # gamma
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def forward(self, states: States, *, document: bool) -> Words:
        h_NTD = states.layers[-1]
        vectors_NWE, mask_NW = unique_words(self.words(h_NTD), states.words_NT)
        gate_NW = mask_NW.to(vectors_NWE.dtype)
        if document and self.gate is not None:
            gate_NW = torch.relu(self.gate(vectors_NWE)[..., 0]) * gate_NW
            vectors_NWE = vectors_NWE * gate_NW[..., None]
        if self.last is not None:
            vectors_NWE = self.last(vectors_NWE)
        key_NW = torch.zeros(mask_NW.shape, dtype=torch.int64)
        for n, words in enumerate(states.vocabulary_N):
            kept = words[: mask_NW.shape[1]]
            key_NW[n, : len(kept)] = torch.tensor([word_key(w) for w in kept], dtype=torch.int64)
        return Words(self.whole(h_NTD[:, 0]), vectors_NWE, mask_NW, key_NW.to(mask_NW.device), gate_NW)

    def score(self, queries: Words, documents: Words, *, exact: bool) -> tuple[Tensor, Tensor]:
        """(merged, of whole texts alone) for each query with the document of the same number, shape (N,)."""
        whole_N = (queries.whole_NC * documents.whole_NC).sum(-1)
        words_N = word_scores(queries, documents, exact)
        weight = torch.sigmoid(self.balance)
        return weight * whole_N + (1 - weight) * words_N, whole_N


def word_scores(queries: Words, documents: Words, exact: bool) -> Tensor:
    """Sum over query words of the best inner product with a document's word; with `exact` only equal words match."""
    match_NWV = torch.einsum("nwe,nve->nwv", queries.vectors_NWE, documents.vectors_NWE)
    if exact:  # before padding: a word without a partner scores 0
        same_NWV = queries.key_NW[:, :, None] == documents.key_NW[:, None, :]
        match_NWV = match_NWV * (same_NWV & documents.mask_NW[:, None, :])
    match_NWV = match_NWV.masked_fill(~documents.mask_NW[:, None, :], 0.0 if exact else NOTHING)
    best_NW = match_NWV.max(-1).values
    return (best_NW * queries.mask_NW).sum(-1)


def unique_words(x_NTE: Tensor, words_NT: Tensor) -> tuple[Tensor, Tensor]:
    """(vectors_NWE, mask_NW): the mean over all tokens of all occurrences of each word; tokens of no word are left
    out."""
    count = max(int(words_NT.max()) + 1, 1)
    member_NWT = words_NT[:, None, :] == torch.arange(count, device=words_NT.device)[None, :, None]
    tokens_NW = member_NWT.sum(-1)
    sums_NWE = member_NWT.to(x_NTE.dtype) @ x_NTE
    return sums_NWE / tokens_NW.clamp(min=1)[..., None], tokens_NW > 0


def word_key(word: str) -> int:
    """A number for a word that is the same everywhere."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def first_rows(texts: Sequence[str], size: int) -> list[list[int]]:
    """Rows in blocks of `size`, texts alike in length together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]
