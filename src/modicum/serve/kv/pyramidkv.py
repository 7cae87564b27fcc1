"""pyramidkv: snapkv's votes, with more entries in the first layers and fewer in the last.

Attention is spread over the whole prompt in the first layers and gathers on few tokens towards the last. So the
budget falls from layer to layer along a straight line, with the same mean; which entries a head keeps of it is decided
by the votes of the prompt's last `window` tokens, as in snapkv.

    least = (budget - window) / beta,   most = 2 (budget - window) - least
    kept[l] = window + most - l (most - least) / (L - 1)

Cai et al. 2024, arXiv:2406.02069, section 3.2, with the constants of the authors' code. Departs: where `most` is more
than the prompt has, what is cut off goes to the last layers, so that the mean is kept (as in that code); KV heads vote
as a group (see snapkv).
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.core.errors import UserError
from modicum.serve.kv import entries_of, snapkv


@dataclass(frozen=True, kw_only=True)
class Config(snapkv.Config):
    window: int = 8  # last tokens of the prompt, whose queries vote and which stay themselves
    kernel: int = 7  # places that are pooled, odd
    pooling: str = "max"  # or mean
    beta: float = 20  # the last layer has 1 / beta of the mean, window apart

    def __post_init__(self) -> None:
        snapkv.check("pyramidkv", self)
        if self.beta < 1:
            raise UserError(f"pyramidkv: beta={self.beta:g} must be at least 1, where all layers have the same budget")


TOY = Config(budget=12, window=4, kernel=3, beta=4)
CLAIM = {
    "figure": "matches the full cache on LongBench with 12% of it",
    "where": "abstract",
    "scale": "Llama-3-8B and Mistral-7B, prompts of 8K tokens and more",
}
SWEEP = {"budget": (0.2,)}


class PyramidKV(snapkv.SnapKV):
    config: Config

    def capacity(self, layer: int) -> int:
        mean = min(self.prompt, entries_of(self.config.budget, self.prompt))
        window = self.config.window if mean > self.config.window else max(1, mean // 2)
        old, last = self.prompt - window, self.shape.layers - 1
        if mean == self.prompt or not last:
            return mean
        least = (mean - window) / self.config.beta
        most = 2 * (mean - window) - least
        if most > old:
            most, least = old, 2 * (mean - window) - old
        # Rounded so that no layer pays for another: the sum of all layers stays that of the mean.
        return window + max(1, round(most - layer * (most - least) / last))
