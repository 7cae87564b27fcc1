"""arithmetic: a sum, difference or product of numbers, answered in digits.

"37 + 45 =" is answered by 82. Numbers have up to `digits` digits, uniform in their number of digits so
that short and long ones are equally frequent; `spaced` writes every number digit by digit ("3 7 + 4 5 =
8 2"), which makes each digit a token of any vocabulary.

Brown et al. 2020, arXiv:2005.14165, section 3.9.1. Departs: no question around the expression,
differences may be negative, more than two terms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from modicum.evaluate.playground import Playground, PlaygroundConfig
from modicum.evaluate.tasks import Doc

SWEEP = {"digits": (1, 2)}


@dataclass(frozen=True, kw_only=True)
class Config(PlaygroundConfig):
    digits: int = 2
    terms: int = 2
    operations: str = "+-"  # any of + - *
    spaced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.digits <= 30, "digits must lie between 1 and 30")
        self.require(2 <= self.terms <= 10, "terms must lie between 2 and 10")
        self.require(bool(self.operations) and not set(self.operations) - set("+-*"), "operations must be of + - *")


TOY = Config(examples=20)


class Arithmetic(Playground):
    config: Config

    def make(self, rng: Random) -> tuple[str, str]:
        numbers = [self._number(rng) for _ in range(self.config.terms)]
        signs = [rng.choice(self.config.operations) for _ in numbers[1:]]
        total, product = 0, numbers[0]  # products bind before sums
        for sign, number in zip(signs, numbers[1:], strict=True):
            if sign == "*":
                product *= number
            else:
                total, product = total + product, number if sign == "+" else -number
        text = str(numbers[0]) + "".join(f" {s} {n}" for s, n in zip(signs, numbers[1:], strict=True))
        return f"{self._written(text)} =", self._written(str(total + product))

    def steps(self, doc: Doc) -> tuple[str, ...]:
        """One operation each, products first; `{0}` stands for the first one's result."""
        line = doc["prompt"].removesuffix(" =")
        parts = re.findall(r"\d+|[-+*]", line.replace(" ", "")) if self.config.spaced else line.split()
        steps: list[str] = []
        for signs in ("*", "+-"):
            while (at := next((i for i in range(1, len(parts), 2) if parts[i] in signs), None)) is not None:
                left, sign, right = (p if p.startswith("{") else self._written(p) for p in parts[at - 1 : at + 2])
                parts[at - 1 : at + 2] = [f"{{{len(steps)}}}"]
                steps.append(f"{left} {sign} {right} =")
        return tuple(steps)

    def _number(self, rng: Random) -> int:
        size = rng.randint(1, self.config.digits)
        return rng.randint(0 if size == 1 else 10 ** (size - 1), 10**size - 1)

    def _written(self, text: str) -> str:
        return " ".join(text.replace(" ", "")) if self.config.spaced else text
