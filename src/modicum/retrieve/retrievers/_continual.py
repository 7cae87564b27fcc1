"""Learning one collection after another: sharpness-aware steps, pseudo-queries, and how much is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sam_step(parameters: Iterable[Tensor], loss: Callable[[], Tensor], optimizer: Any, rho: float) -> float:
    """One step with the gradient at w' = w + rho g / |g|, applied at w (Foret et al. 2021, arXiv:2010.01412).

    |g| is of all parameters together. rho = 0 is a plain step. Returns the loss at w.
    """
    parameters = list(parameters)
    optimizer.zero_grad()
    value = loss()
    value.backward()
    if rho:
        with torch.no_grad():
            gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
            norm = torch.stack([g.norm() for g in gradients if g is not None]).norm().clamp(min=1e-12)
            before = [p.clone() for p in parameters]
            for p, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    p.add_(rho * g / norm)
        optimizer.zero_grad()
        loss().backward()
        with torch.no_grad():
            for p, w in zip(parameters, before, strict=True):
                p.copy_(w)
    optimizer.step()
    return float(value.detach())


def spans(text: str, count: int, rng: np.random.Generator) -> list[str]:
    """Pseudo-queries by rule: runs of 3 to 8 words of the text."""
    words = text.split()
    queries = []
    for _ in range(count):
        length = min(int(rng.integers(3, 9)), len(words))
        start = int(rng.integers(0, len(words) - length + 1))
        queries.append(" ".join(words[start : start + length]))
    return queries


def continual(table: Sequence[Sequence[float]]) -> dict[str, float]:
    """From table[t][c], the quality on collection c after learning collection t (c <= t), after the last one:

    average  A = mean over c of table[t][c]
    forgot   F = mean over c < t of (max over t' < t of table[t'][c]) - table[t][c]
    learnt  LA = mean over t of table[t][t]
    """
    last = len(table) - 1
    drops = [max(table[t][c] for t in range(c, last)) - table[last][c] for c in range(last)]
    return {
        "average": float(np.mean(table[last])),
        "forgot": float(np.mean(drops)) if drops else 0.0,
        "learnt": float(np.mean([table[t][t] for t in range(len(table))])),
    }
