"""port guide: next-token logits of several models, made one distribution to sample from.

Models beside the served one run on the same tokens in the same step, each with a cache of its own in the same blocks
(`serve.guided`), and the method combines what they give. Unlike a drafter it changes the distribution; sampling,
structured output, drafts and the prefix cache work on the combined logits as ever.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from modicum.core.registry import Method

BASELINE = "none"


class Guide(Method):
    """Constructed as `cls(config)`. folders: the knobs that name models, in the order in which `combine` gets them."""

    conflicts: ClassVar[frozenset[str]] = frozenset({"eviction"})
    folders: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any):
        self.config = config

    def models(self) -> list[str]:
        """Folders or names of the models that run beside; knobs that are empty name none."""
        return [getattr(self.config, knob) for knob in self.folders if getattr(self.config, knob)]

    def combine(self, main_RV: Tensor, beside: Sequence[Tensor]) -> Tensor:
        """logits_RV to sample from, finite; `beside` has those of `models()`."""
        raise NotImplementedError
