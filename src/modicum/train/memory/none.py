"""none: keeps what autograd keeps.

The baseline: every activation that a backward pass reads stays until then, and the loss is taken a slice of
the logits at a time, as `train.loss` does for everyone.

    peak = weights + gradients + optimizer state + activations of one micro-batch

No paper; this is what PyTorch does. Departs from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.train.memory import MemorySaver


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Nothing(MemorySaver):
    provides = frozenset()
    conflicts = frozenset()
    config: Config
