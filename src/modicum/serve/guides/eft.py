"""eft: a large model that speaks as if it had been fine-tuned, by what fine-tuning did to a small one.

    log p = log p_main + weight (log p_tuned - log p_base)        renormalised at every token

main: the served, large base model; tuned and base: a small model after and before fine-tuning, of one tokenizer with
it. Fine-tuning as reinforcement learning under a KL penalty makes log p_tuned - log p_base the reward that was learnt,
up to a constant; here it is applied at another scale. The other way round (a large pair, a small model served) works
alike. `also` is a second tuned model: the difference is then that of (1 - mix) tuned + mix also. top_p: tokens outside
of the main model's nucleus are left out, since the difference is unreliable where both small models are certain of
nothing. Temperature and filters of a request act on the sum.

Mitchell et al. 2023, arXiv:2310.12962, sections 3 and 4 (ICLR 2024). Departs: any drafter may guess and the sum
verifies, in place of the tuned small model; the form of the nucleus filter is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from modicum.core.errors import UserError
from modicum.serve.guides import Guide

OUT = -1e30  # the logit of a token that is left out; finite, so that sums of logits stay numbers


@dataclass(frozen=True, kw_only=True)
class Config:
    tuned: str = ""  # small model after fine-tuning: a folder or name
    base: str = ""  # the same before
    also: str = ""  # a second tuned model, mixed in
    mix: Annotated[float, Field(ge=0, le=1)] = 0.5  # of `also`
    weight: float = 1.0  # of the difference
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # nucleus of the main model; 1: all tokens


CLAIM = {"figure": "more helpful and factual answers with no training of the large model", "where": "abstract",
         "scale": "Llama-1, Llama-2, Falcon of 7B to 70B"}  # fmt: skip


class Eft(Guide):
    config: Config
    folders = ("tuned", "base", "also")

    def models(self) -> list[str]:
        if not self.config.tuned or not self.config.base:
            raise UserError("eft needs two small models: eft:tuned=FOLDER,base=FOLDER, the second before fine-tuning")
        return super().models()

    def combine(self, main_RV: Tensor, beside: Sequence[Tensor]) -> Tensor:
        c = self.config
        main, tuned, base, *also = (x.float().log_softmax(-1) for x in (main_RV, *beside))
        if also:
            tuned = (1 - c.mix) * tuned + c.mix * also[0]
        sum_RV = main + c.weight * (tuned - base)
        if c.top_p < 1:
            sum_RV = sum_RV.masked_fill(~nucleus(main, c.top_p), OUT)
        return sum_RV


def nucleus(log_p_RV: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that have `top_p` together, bool (R, V); the one that reaches it is among them."""
    sorted_RV, order_RV = log_p_RV.exp().sort(-1, descending=True)
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    return torch.zeros_like(log_p_RV, dtype=torch.bool).scatter_(-1, order_RV, before_RV < top_p)
