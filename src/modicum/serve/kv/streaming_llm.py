"""streaming-llm: the first entries and a window of the latest ones, at the places they have in the cache.

The first tokens are attention sinks: softmax puts there what it has no use for, so a window without them fails. With
a few of them kept, a stream may be of any length in a cache of constant size. Positions are those within the cache and
not in the text, so that no rotation is beyond what was trained.

    seen(q, k)     = k <= q  and  (q - k < window  or  k < sinks)
    distance(q, k) = q - k for the window;  min(q, sinks + window - 1) - k for the sinks

Xiao et al. 2023, arXiv:2309.17453, section 3.2. Departs: keys are kept rotated and the sinks, whose distance is not
that of the text, are turned when read (the paper keeps keys unrotated); prompts are computed under the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from modicum.core.errors import UserError
from modicum.serve.kv.lm_infinite import LMInfinite

if TYPE_CHECKING:
    from modicum.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Config:
    sinks: int = 4  # first entries that stay
    window: int = 1020  # latest entries that stay

    def __post_init__(self) -> None:
        for name, low in (("sinks", 0), ("window", 1)):
            if getattr(self, name) < low:
                raise UserError(f"streaming-llm: {name}={getattr(self, name)} must be at least {low}")


TOY = Config(sinks=2, window=10)
CLAIM = {
    "figure": "stable to 4 million tokens; up to 22.2 times as fast as recomputing the window",
    "where": "abstract",
    "scale": "Llama-2, MPT, Falcon and Pythia of up to 70B parameters",
}
SWEEP = {"window": (76,)}


class StreamingLLM(LMInfinite):
    config: Config  # type: ignore[assignment]

    def prepare(self, model: Decoder, probe: Sequence[int] = ()) -> None:
        self.window, self.exact = self.config.window, self.config.sinks + self.config.window
        self.ceiling = self.exact - 1
        self.look_at(model)

    def early(self, position_GBF: Tensor) -> Tensor:
        return position_GBF
