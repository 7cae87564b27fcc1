"""domain-upsampling: the mixture as it is until near the end, then one that is rich in the domains that matter.

    w(done) = base          while done < (1 - fraction) total
            = up            from there on

`base` is given, or in proportion to the domains' sizes; `up` is given, or `base` with the weights of some domains
multiplied by `boost` and all scaled to sum to 1 again. Both are weights of tokens. The change comes by tokens of the
mixture, so schedule and total are those of a run without it.

Blakeney et al. 2024, arXiv:2406.03476, sections 2 and 3: the last 10 to 20% of a run of 1T tokens are best, and large
general web text leaves the mixture there while a part of it stays. Departs from the paper: `boost` is this file's. What
a data set in `up` is worth is measured by leaving it out of `up` for the same share of the same run. A small domain is
repeated within the window; up to about four epochs of it cost little (Muennighoff et al. 2023, arXiv:2305.16264).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from modicum.core.errors import UserError, unknown
from modicum.data.mixtures import Mixture

CLAIM = {
    "figure": "over a run without it, for the same tokens: MMLU 35.69 to 42.59, GSM8K 14.71 to 22.97",
    "where": "Table 3",
    "scale": "7B parameters, 1T tokens, the last 20%",
}

SWEEP = ("boost={prose: 4}",)


@dataclass(frozen=True, kw_only=True)
class Config:
    fraction: float = 0.2  # of the run's tokens that are read with `up`; 0.1 to 0.2 are the paper's best
    base: dict[str, float] = field(default_factory=dict)  # weights before; empty: by the domains' sizes
    up: dict[str, float] = field(default_factory=dict)  # weights after
    boost: dict[str, float] = field(default_factory=dict)  # instead of `up`: factors on `base`

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} must be above 0 and at most 1")
        if self.up and self.boost:
            raise ValueError("give either up={domain: weight} or boost={domain: factor}")
        for weights in (self.base, self.up, self.boost):
            if any(not math.isfinite(w) or w < 0 for w in weights.values()):
                raise ValueError(f"weights and factors are numbers that are not negative: {weights}")


TOY = Config(boost={"code": 5})


class DomainUpsampling(Mixture):
    config: Config

    def __init__(self, config: Config, sizes: Mapping[str, int]):
        super().__init__(config, sizes)
        if not config.up and not config.boost:
            raise UserError(
                "domain-upsampling needs the mixture of the end; write domain-upsampling:boost={domain: factor}, or "
                "up={domain: weight}"
            )
        for name, given in (("base", config.base), ("up", config.up), ("boost", config.boost)):
            for domain in given:
                if domain not in self.sizes:
                    raise unknown(f"domain in {name}", domain, self.sizes)
        self.base = _scaled("base", config.base or {d: float(n) for d, n in self.sizes.items()})
        self.up = _scaled("up", config.up or {d: w * config.boost.get(d, 1.0) for d, w in self.base.items()})

    def weights(self, done: float, total: float | None) -> dict[str, float]:
        """Raises `UserError` for a run of unknown length: its end cannot be known."""
        if total is None:
            raise UserError(
                "domain-upsampling changes the mixture near the run's end; give the run a number of tokens, such as "
                "--tokens 10Mtok"
            )
        return self.base if done < (1 - self.config.fraction) * total else self.up


def _scaled(name: str, weights: Mapping[str, float]) -> dict[str, float]:
    whole = sum(weights.values())
    if whole <= 0:
        raise UserError(f"all weights of {name} are 0; give at least one domain a weight above 0")
    return {domain: w / whole for domain, w in weights.items()}
