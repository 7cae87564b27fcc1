"""Texts as weights over a vocabulary, for `lexlip`: two read-outs of masked-word logits, the weak decoder, the loss.

Shape letters: N texts, T tokens, V vocabulary, D width, B queries, P passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.retrieve.student import Student
from modicum.retrieve.trainers._masking import MaskedHead, embedding, predicted

PADDING = -1e6  # logit of what is no token


class LexicalHeads(nn.Module):
    """The masked-word head, which is searched with, and the weak decoder, which is not needed afterwards."""

    def __init__(self, student: Student, decoder_heads: int):
        super().__init__()
        self.masked = MaskedHead(student)
        D = student.width
        self.decoder = nn.TransformerEncoderLayer(D, decoder_heads, 2 * D, dropout=0.0, batch_first=True)

    def bottleneck(self, student: Student, h_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """b_ND = softmax(max over positions of the logits) E, with no gradient into E."""
        p_NV = self.logits(student, h_NTD, mask_NT).softmax(-1)
        return p_NV @ embedding(student).detach()

    def logits(self, student: Student, h_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """logits_NV: of every word the largest over the positions."""
        logits_NTV = self.masked(h_NTD, embedding(student))
        return logits_NTV.masked_fill(~mask_NT[..., None], PADDING).amax(1)

    def weights(self, student: Student, h_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """v_NV = ln(1 + max over positions of relu(logits)), of length 1."""
        return F.normalize(torch.log1p(torch.relu(self.logits(student, h_NTD, mask_NT))), dim=-1)

    def rebuilt(self, student: Student, b_ND: Tensor, ids_NT: Tensor, real_NT: Tensor, hidden_NT: Tensor) -> Tensor:
        """Cross-entropy of the tokens hidden from the decoder, which sees the others and b in the first position."""
        seen_NT = ids_NT.masked_fill(hidden_NT, student.tokenizer.mask_token_id)
        x_NTD = student.model.embeddings(input_ids=seen_NT)
        x_NTD = torch.cat([b_ND[:, None], x_NTD[:, 1:]], 1)
        h_NTD = self.decoder(x_NTD, src_key_padding_mask=~real_NT)
        return predicted(self.masked, student, h_NTD, ids_NT, hidden_NT)


def flops(v_NV: Tensor) -> Tensor:
    """Sum over words of the squared mean weight: the products that a search takes (Paria et al. 2020)."""
    return v_NV.abs().mean(0).pow(2).sum()


def encode(student: Student, heads: LexicalHeads, texts: Sequence[str], batch: int = 32) -> Any:
    """A sparse matrix (N, V), float32, of the weights above 0; rows of length 1."""
    from scipy import sparse

    size = int(student.model.config.vocab_size)
    parts = [sparse.csr_matrix((0, size), dtype=np.float32)]
    student.eval()
    heads.eval()
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            states = student(texts[start : start + batch])
            parts.append(sparse.csr_matrix(heads.weights(student, states.layers[-1], states.mask_NT).float().numpy()))
    return sparse.vstack(parts, format="csr")
