"""Masked-word prediction for pretraining trainers: which tokens are hidden, and the head that predicts them.

Shape letters: N texts, T tokens, D width, V vocabulary, M masked tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.retrieve.student import Student


class MaskedHead(nn.Module):
    """logits = E gelu(W h) + b, with the encoder's own word embeddings E (Devlin et al. 2019, arXiv:1810.04805)."""

    def __init__(self, student: Student):
        super().__init__()
        self.transform = nn.Linear(student.width, student.width)
        self.norm = nn.LayerNorm(student.width)
        self.bias = nn.Parameter(torch.zeros(student.model.config.vocab_size))

    def forward(self, h_MD: Tensor, embedding_VD: Tensor) -> Tensor:
        """logits_MV; any leading shape."""
        return self.norm(F.gelu(self.transform(h_MD))) @ embedding_VD.T + self.bias


def embedding(student: Student) -> Tensor:
    """The word embeddings, (V, D)."""
    weight: Tensor = student.model.get_input_embeddings().weight
    return weight


def drawn_mask(words_NT: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """mask_NT: every token of `words_NT` with probability `fraction`, at least one of a text that has any."""
    mask_NT = words_NT & (rng.random(words_NT.shape) < fraction)
    for row in np.flatnonzero(words_NT.any(1) & ~mask_NT.any(1)):
        mask_NT[row, rng.choice(np.flatnonzero(words_NT[row]))] = True
    return mask_NT


def predicted(head: MaskedHead, student: Student, h_NTD: Tensor, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Mean cross-entropy of the masked tokens."""
    logits_MV = head(h_NTD[mask_NT], embedding(student))
    return F.cross_entropy(logits_MV, ids_NT[mask_NT])
