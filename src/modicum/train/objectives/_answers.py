"""Where a batch's answers begin, and which of them are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.train.loss import NO_LOSS


@dataclass(frozen=True)
class Answers:
    """A answers of the documents of a batch. row_A: the row each stands in. first_A: index into B T of the prediction
    of its first token, whose state has read the whole question. label_A: equal for equal answers, int64."""

    row_A: Tensor
    first_A: Tensor
    label_A: Tensor


def answers(batch: Any) -> Answers:
    """The answer of a document is its targets with loss; a document without any has none."""
    targets_BT = batch.targets_BT
    B, T = targets_BT.shape
    learnt_BT = targets_BT != NO_LOSS
    documents_BT = torch.zeros_like(targets_BT) if batch.documents_BT is None else batch.documents_BT
    before_BT = torch.zeros_like(learnt_BT)
    before_BT[:, 1:] = learnt_BT[:, :-1] & (documents_BT[:, 1:] == documents_BT[:, :-1])
    first_A = (learnt_BT & ~before_BT).flatten().nonzero()[:, 0]
    # A label is a sum over the answer of token times a random number of its position, modulo 2^64.
    answer_N = torch.cumsum((learnt_BT & ~before_BT).flatten(), 0) - 1
    within_N = (
        torch.arange(B * T, device=targets_BT.device) - first_A[answer_N.clamp_min(0)] if len(first_A) else answer_N
    )
    keys_T = torch.randint(-(2**62), 2**62, (T,), generator=torch.Generator().manual_seed(0)).to(targets_BT.device)
    learnt_N = learnt_BT.flatten()
    terms_N = (targets_BT.flatten()[learnt_N] + 1) * keys_T[within_N[learnt_N]]
    label_A = torch.zeros(len(first_A), dtype=torch.int64, device=targets_BT.device)
    label_A.index_add_(0, answer_N[learnt_N], terms_N)
    return Answers(first_A // T, first_A, label_A)
