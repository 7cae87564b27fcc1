"""port optimizer: turns gradients into weight updates.

A method is constructed as `cls(config, named, lr=...)`, where `named` gives (name, parameter) of every
trainable parameter; the base class sorts them by `groups`. The loop then calls, once per step,
`begin(scales)` before the first backward pass and `step(scales)` after gradients were summed and
clipped; `scales` comes from the schedule ({"lr": factor, ...}) and multiplies the peak rate `lr`.

Under bf16 training the parameters handed over are float32 master weights (see train.precision), so a
method needs no code for that; with FSDP2 they are DTensors, sharded by rows.

Capabilities: `step_gradients` is provided where updates happen in `step` alone, so that a step may have several
backward passes, the gradients' norm can be limited and bf16 weights can follow float32 masters. A method that updates
layer by layer during the backward pass does not provide it, and tells the loop of the gradients it used up in
`spent`. One that works on sharded parameters (a state tensor is sharded like its parameter, or whole and the same on
every process) has no conflict with `fsdp`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from modicum.budget.cost import Cost
from modicum.core.errors import UserError
from modicum.core.registry import Method
from modicum.train.callback import Callback
from modicum.train.parallel import local

BASELINE = "adamw"
EMBEDDINGS = ("embed", "wte", "wpe")  # how a name's dotted part begins when it is an embedding table
HEADS = ("lm_head", "head", "score")  # a dotted part of the name of what gives logits


@dataclass
class Group:
    """Parameters that are treated alike; `rate` multiplies the learning rate."""

    named: dict[str, Tensor]
    weight_decay: float = 0.0
    rate: float = 1.0


class Optimizer(Method, Callback):
    """Base class. Subclasses fill `step`, the state functions and `cost`; `groups` where they differ."""

    provides: ClassVar[frozenset[str]] = frozenset({"step_gradients"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"fsdp"})

    def __init__(self, config: Any, named: Iterable[tuple[str, Tensor]], *, lr: float = 1e-3):
        pairs = list(named)
        self.config, self.lr = config, lr
        self.named: dict[str, Tensor] = dict(pairs)
        if not pairs:
            raise UserError("there is nothing to train: no parameter requires a gradient")
        self.split = self.groups(pairs)
        placed = [name for group in self.split for name in group.named]
        if sorted(placed) != sorted(self.named):
            raise UserError(
                f"{type(self).__name__}.groups must place each parameter exactly once; "
                f"wrong: {sorted(set(self.named).symmetric_difference(placed))[:4]}"
            )

    def groups(self, named: list[tuple[str, Tensor]]) -> list[Group]:
        """Weight decay acts on matrices alone: not on norms and biases (fewer than two dimensions), and not
        on embedding tables (a dotted part of the name begins with embed, wte or wpe), tied heads included."""
        decay = getattr(self.config, "weight_decay", 0.0)
        matrices = {name: p for name, p in named if p.ndim >= 2 and not is_embedding(name)}
        rest = {name: p for name, p in named if name not in matrices}
        return [g for g in (Group(matrices, decay), Group(rest, 0.0)) if g.named]

    def begin(self, scales: Mapping[str, float]) -> None:
        """Called before the step's first backward pass, for methods that update during it."""

    def spent(self) -> Tensor | float:
        """Sum of squares of the gradients used up during this step's backward pass, for the global norm."""
        return 0.0

    @abstractmethod
    def step(self, scales: Mapping[str, float]) -> None:
        """Update the parameters from their `.grad`; a parameter without one is left as it is."""

    def state_bytes(self) -> int:
        """Bytes of the state tensors really held by this process."""
        tensors = [local(t) for t in self.state_dict().values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    @classmethod
    @abstractmethod
    def cost(cls, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        """Forecast for parameters of these shapes: peak_bytes is the state's, flops are one step's."""


def is_embedding(name: str) -> bool:
    return any(part.startswith(EMBEDDINGS) for part in name.split("."))


def is_head(name: str) -> bool:
    return any(part in HEADS for part in name.split("."))
