"""What carries out a step's plan. Each backend says what it cannot do; a step goes to the first that can.

`torch` is the truth and runs everywhere: the decoder as it is written, with attention over the plan's segments.
`native` covers decoders of the Llama kind on a CPU with AVX-512 or AVX2, `graphs` replays decode steps on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from modicum.core.errors import ModicumError
from modicum.serve.plan import AttentionPlan


class CannotRun(Exception):
    """Raised by a backend that finds out on the way; nothing of the step is lost, the next backend takes it."""


class Backend(Protocol):
    name: str

    def cannot(self, plan: AttentionPlan) -> str | None:
        """Why it cannot run this step, in a few words; None if it can."""
        ...

    def __call__(self, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        """Logits (len(rows), V) of the given rows of the step; None for no rows."""
        ...

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Logits (len(rows), V) of more rows of the step that it ran last."""
        ...


class Runner:
    """Backends in the order of their speed, the last one able to run every plan. `fallbacks` counts refused steps."""

    def __init__(self, *backends: Backend):
        self.backends, self._last = backends, backends[-1]
        self.fallbacks: Counter[str] = Counter()

    @property
    def name(self) -> str:
        return self.backends[0].name

    def order(self, plan: AttentionPlan) -> Sequence[Backend]:
        """The backends as this step asks them."""
        return self.backends

    def __call__(self, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        """Logits (len(rows), V) of the given rows of the step; None for no rows."""
        for backend in self.order(plan):
            reason = backend.cannot(plan)
            if reason is None:
                try:
                    self._last = backend
                    return backend(plan, rows)
                except CannotRun as error:
                    reason = str(error)
            self.fallbacks[f"{backend.name}: {reason}"] += 1
        raise ModicumError("no backend can run this step")

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Logits (len(rows), V) of more rows of the step that ran last."""
        return self._last.logits(rows)
