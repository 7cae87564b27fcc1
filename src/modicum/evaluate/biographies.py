"""Biographies of people who do not exist, for measuring how much a model remembers, in bits.

A person is a name (first, middle, last, drawn from `names` of each kind) and six attributes drawn from known numbers of
values, so the information in a set of people is known exactly. Words are made of syllables. Person i of a seed is the
same however many people there are; a biography is one of many renderings of a person.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

SYLLABLES = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]
_MONTHS = "January February March April May June July August September October November December"
MONTHS = _MONTHS.split()
# attribute: verbs that can stand between the person and the value
VERBS = {
    "date": ("was born on", "came into the world on", "began life on", "has a birthday on", "first saw light on"),
    "city": ("was born in", "grew up in", "comes from", "is a native of", "spent the first years in"),
    "university": ("studied at", "has a degree of", "went to", "learnt at", "was a student of"),
    "major": ("read", "has studied", "took a course in", "is learned in", "wrote a thesis on"),
    "employer": ("works for", "is employed by", "has a desk at", "earns a living at", "was hired by"),
}
ENDS = ("", " once", " indeed", ", it is known", ", friends say", ", papers show", " as recorded", " by all accounts")
PRONOUNS = ("He", "She")


@dataclass(frozen=True)
class Sizes:
    """How many values there are of each kind."""

    names: tuple[int, int, int] = (400, 400, 1000)
    years: int = 200
    cities: int = 200
    universities: int = 300
    majors: int = 100
    employers: int = 263

    def attributes(self) -> dict[str, int]:
        return {
            "pronoun": 2,
            "date": 12 * 28 * self.years,
            "city": self.cities,
            "university": self.universities,
            "major": self.majors,
            "employer": self.employers,
        }

    @property
    def name_bits(self) -> float:
        """log2 of the number of names."""
        return math.log2(math.prod(self.names))

    @property
    def attribute_bits(self) -> float:
        """log2 of the number of people of one name."""
        return sum(map(math.log2, self.attributes().values()))


@dataclass(frozen=True)
class Person:
    name: str
    values: dict[str, str]


class People:
    """Person by number; words of each kind are made once."""

    def __init__(self, sizes: Sizes, seed: int):
        self.sizes, self.seed = sizes, seed
        counts = dict(zip(("first", "middle", "last"), sizes.names, strict=True))
        counts |= {k: n for k, n in sizes.attributes().items() if k in ("city", "university", "major", "employer")}
        self.words = {kind: _words(kind, count) for kind, count in counts.items()}

    def __getitem__(self, index: int) -> Person:
        rng = Random(f"people/{self.seed}/{index}")
        name = " ".join(rng.choice(self.words[kind]) for kind in ("first", "middle", "last"))
        year = 2000 - self.sizes.years + rng.randrange(self.sizes.years)
        date = f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {year}"
        values = {"pronoun": rng.choice(PRONOUNS), "date": date}
        return Person(name, values | {kind: rng.choice(self.words[kind]) for kind in list(VERBS)[1:]})


def _words(kind: str, count: int) -> list[str]:
    """`count` different words of two syllables, in an order of the kind's own."""
    n = len(SYLLABLES)
    order = Random(f"biographies/{kind}").sample(range(n * n), n * n)
    return ["".join(SYLLABLES[i] for i in divmod(order[k], n)).capitalize() for k in range(count)]


def sentences(person: Person, rng: Random) -> Iterator[str]:
    """A biography: a sentence for each attribute, in random order and words, the pronoun after the first."""
    subject = person.name
    for kind in rng.sample(list(VERBS), len(VERBS)):
        yield f"{subject} {rng.choice(VERBS[kind])} {person.values[kind]}{rng.choice(ENDS)}."
        subject = person.values["pronoun"]


def short(person: Person) -> str:
    """The same facts in the fewest words: the name, then the values in one order."""
    return "; ".join([person.name, *person.values.values()]) + "."


def learnt_bits(name_nats: float, nats: dict[str, float], sizes: Sizes) -> float:
    """Bits that a model knows of a person, from mean losses: sums over the tokens of a name, and of each value.

        log2(N0 / e^p1) + sum over attributes of log2(S_a / e^p2_a),

    each term at least 0, as a model that is worse than guessing knows nothing.
    """
    bits = max(sizes.name_bits - name_nats / math.log(2), 0.0)
    for kind, size in sizes.attributes().items():
        bits += max(math.log2(size) - nats[kind] / math.log(2), 0.0)
    return bits


def most_bits(people: int, sizes: Sizes) -> float:
    """What can be known of each of so many people: names that are a set, N log2(N0 / N), and all attributes."""
    return max(sizes.name_bits - math.log2(people), 0.0) + sizes.attribute_bits
