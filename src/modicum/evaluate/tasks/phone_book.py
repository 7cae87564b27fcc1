"""phone-book: one number out of a list of names with numbers.

    Mary Baker: 4071 ... Tom Wood: 9926  The number of Tom Wood is 9926

`entries` names, all different and with different numbers of `digits` digits; the queried one stands at `depth` of the
list (0 first, 1 last; left out: anywhere). Names share first and last names, so both words are needed: `distinct=true`
gives every entry names of its own. Chance is 1 / entries, a guess among the numbers that stand there.

Jelassi et al. 2024, arXiv:2402.01032 (Repeat After Me, section 4.2). Departs: no examples before the list unless the
run asks for some, and shorter numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from modicum.evaluate.playground import Playground, PlaygroundConfig
from modicum.evaluate.tasks import Doc

_FIRST = (
    "Alice Anna Ben Bob Carl Clara David Emma Eva Frank Fred George Grace Hannah Harry Helen Henry Ida Jack James "
    "Jane John Julia Kate Laura Leo Lucy Mark Martin Mary Max Nina Oscar Paul Peter Rosa Ruth Sam Sara Tom"
)
_LAST = (
    "Baker Bell Black Brook Brown Bush Carter Church Cook Cooper Cross Day Field Fisher Ford Fox Green Hall Hill "
    "Hunter King Lake Lane Long March Mason Miller North Page Park Pool Rice Rose Short Smith Stone Taylor Wall "
    "West Wood"
)
FIRST, LAST = _FIRST.split(), _LAST.split()
SWEEP = {"entries": (8, 32)}


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    entries: int = 16
    digits: int = 4
    depth: float | None = None  # of the queried entry; None: anywhere
    distinct: bool = False  # no two entries share a first or a last name

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.digits <= 12, "digits must lie in 1 to 12")
        most = min(len(FIRST) if self.distinct else len(FIRST) * len(LAST), 9 * 10 ** (self.digits - 1))
        self.require(2 <= self.entries <= most, f"entries must lie in 2 to {most} with digits={self.digits}")
        self.require(self.depth is None or 0 <= self.depth <= 1, "depth must lie in 0 to 1")


TOY = Config(examples=20, entries=6)


class PhoneBook(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        c = self.config
        if c.distinct:
            names = list(zip(rng.sample(FIRST, c.entries), rng.sample(LAST, c.entries), strict=True))
        else:
            names = [
                (FIRST[i // len(LAST)], LAST[i % len(LAST)])
                for i in rng.sample(range(len(FIRST) * len(LAST)), c.entries)
            ]
        numbers = rng.sample(range(10 ** (c.digits - 1), 10**c.digits), c.entries)
        lines = [f"{' '.join(name)}: {number}" for name, number in zip(names, numbers, strict=True)]
        row = rng.randrange(c.entries) if c.depth is None else round(c.depth * (c.entries - 1))
        return "\n".join([*lines, f"The number of {' '.join(names[row])} is"]), str(numbers[row])

    def chance(self, doc: Doc) -> float:
        return 1 / self.config.entries
