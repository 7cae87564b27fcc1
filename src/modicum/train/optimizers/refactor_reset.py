"""refactor-reset: AdamW on low-rank factors that are balanced, and starts afresh, every few hundred steps.

For a layer that trains W = B A (as `sltrain` and `lora` do), every `every` steps the product is decomposed
and its singular values are shared evenly between the two factors, which leaves the function as it is and is
the split with the best conditioned Hessian. As the moments belong to the old factors, and old batches may
have spoilt them, those of all parameters return to zero, and the rate recovers over a few steps.

    B A = U S V^T             B = U S^(1/2),   A = S^(1/2) V^T         (refactor)
    m = v = 0,  t = 0         rate * (1, 2, ..., recovery) / recovery  (reset)

The product is never formed: the factors' own QR decompositions leave an R x R matrix to decompose. `every=0`
is AdamW on the same factors. Glentis et al. 2025, arXiv:2505.22922, section 4 (lemma 4.1).
Departs from the paper: betas and decay default to those of `adamw`; the recovery of the rate is the authors'
released code's. A model without factors is refused: they are the form's, not the optimizer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.budget.cost import Cost
from modicum.core.errors import UserError
from modicum.train.optimizers import Optimizer, adamw
from modicum.train.optimizers._moments import check_adam
from modicum.train.parallel import agreed, full, local, shard_like

CLAIM = {
    "figure": "low-rank factors at a lower perplexity than GaLore and Fira, with about 25% less memory",
    "where": "abstract",
    "scale": "LLaMA 1B, C4",
}
SWEEP = {"every": (100,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = 200  # steps between two restarts (T); 0 for none
    refactor: bool = True  # balance the factors at a restart
    reset: bool = True  # set the moments to zero at a restart
    recovery: int = 10  # steps over which the rate recovers after a reset
    factors: tuple[str, str] = ("A", "B")  # how the names of a pair end: A_RI and B_OR of W = B A
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        check_adam(self.beta1, self.beta2, self.eps, self.weight_decay)
        if self.every < 0 or self.recovery < 0:
            raise ValueError(f"every={self.every} and recovery={self.recovery} must be at least 0 steps")
        if 0 < self.every <= self.recovery and self.reset:
            raise ValueError(
                f"recovery={self.recovery} must be shorter than every={self.every}, or the rate never recovers"
            )
        if self.every and not (self.refactor or self.reset):
            raise ValueError("refactor and reset are both off; write every=0 for plain AdamW")
        if not all(self.factors) or self.factors[0] == self.factors[1]:
            raise ValueError(f"factors={list(self.factors)} must be two different endings of names")


TOY = Config(every=4, recovery=2)


class RefactorReset(Optimizer):
    """State: AdamW's since the last restart, and `steps`, those of the whole run."""

    config: Config
    requires = frozenset({"factors"})
    conflicts = frozenset()

    def __init__(self, config: Config, named: Iterable[tuple[str, Tensor]], *, lr: float = 1e-3):
        super().__init__(config, named, lr=lr)
        self.pairs = pairs(self.named, config.factors)
        knobs = adamw.Config(beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
        self.adam = adamw.AdamW(knobs, self.named.items(), lr=lr)
        self.steps = 0

    @torch.no_grad()
    def step(self, scales: Mapping[str, float]) -> None:
        self.adam.step({**scales, "lr": scales["lr"] * self.recovered()})
        self.steps += 1
        if not self.config.every or self.steps % self.config.every:
            return
        if self.config.refactor:
            for a, b in self.pairs:
                _balance(self.named[a], self.named[b])
        if self.config.reset:
            self.adam.load_state_dict({})

    def recovered(self) -> float:
        """Share of the rate that the coming step has, after a reset."""
        c = self.config
        if not (c.every and c.reset and c.recovery) or self.steps < c.every:
            return 1.0
        return min(1.0, (self.steps % c.every + 1) / c.recovery)

    def state_dict(self) -> dict[str, Any]:
        return {**self.adam.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.adam.load_state_dict({key: value for key, value in state.items() if key != "steps"})

    @classmethod
    def cost(cls, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        return adamw.AdamW.cost(adamw.Config(), shapes)


def pairs(named: Mapping[str, Tensor], endings: tuple[str, str]) -> list[tuple[str, str]]:
    """Names of (A_RI, B_OR) that stand beside each other. Raises `UserError` where there is none."""
    first, second = (f".{ending}" for ending in endings)
    groups = []
    for name, a in named.items():
        other = name.removesuffix(first) + second
        b = named.get(other)
        if name.endswith(first) and b is not None and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]:
            groups.append((name, other))
            if a.shape[0] > min(b.shape[0], a.shape[1]):
                raise UserError(
                    f"refactor-reset: {name} has rank {a.shape[0]}, larger than its matrix of {b.shape[0]} x "
                    f"{a.shape[1]}; attach the form with rank<={min(b.shape[0], a.shape[1])}"
                )
    if not groups:
        raise UserError(
            f"refactor-reset found no factors: no trained NAME.{endings[0]} (R x I) with a NAME.{endings[1]} "
            "(O x R) beside it; attach a form that trains W = B A, or name theirs: factors=[lora_A, lora_B]"
        )
    return groups


def _balance(a: Tensor, b: Tensor) -> None:
    """Give both factors the square roots of the product's singular values, in place."""
    q_OR, r_RR = torch.linalg.qr(full(b).float())
    p_IR, l_RR = torch.linalg.qr(full(a).float().T)
    u, s, vh = torch.linalg.svd(r_RR @ l_RR.T)
    root = s.sqrt()
    new_b, new_a = q_OR @ (u * root), (p_IR @ (vh.T * root)).T
    for p, value in ((b, new_b), (a, new_a)):
        local(p).copy_(local(shard_like(agreed(value, p), p)))
