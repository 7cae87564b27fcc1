"""plain: the score itself, with a 95% interval: what every other probe is beside.

    s = right / n,      Wilson's interval

Wilson 1927 (JASA 22:209). The effect it looks for is a score above chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.core.errors import UserError
from modicum.evaluate.answers import wilson
from modicum.evaluate.compare import sign_test
from modicum.evaluate.probes import Asked, Graded, Grader, Item, Probe, Report, ask


@dataclass(frozen=True, kw_only=True)
class Config:
    """No knobs."""


class Plain(Probe):
    config: Config

    def run(self, items: Sequence[Item], grade: Grader, budget: int, seed: int = 0) -> Report:
        picked = list(items)[:budget]
        if not picked:
            raise UserError(f"a budget of {budget} gradings and {len(items)} items give nothing to score")
        right = [g.right for g in grade([ask(item) for item in picked])]
        low, high = wilson(sum(right), len(right))
        chance = float(np.mean([1 / len(item.choices) for item in picked]))
        detected = low > chance
        figures = {"score": {"value": float(np.mean(right)), "low": low, "high": high}}
        verdict = f"{'above' if detected else 'not above'} chance ({chance:.0%})"
        return Report(figures=figures, detected=detected, verdict=verdict, graded=len(picked))

    def simulate(self, rng: np.random.Generator, effect: bool) -> tuple[list[Item], Grader, int]:
        items = [Item(str(i), f"question {i}", ("a", "b", "c", "d"), int(rng.integers(4))) for i in range(200)]
        rate = 0.45 if effect else 0.25

        def grade(prompts: Sequence[Asked]) -> list[Graded]:
            return [Graded(bool(rng.random() < rate), (0.0,) * 4) for _ in prompts]

        assert sign_test(0, 0) == 1
        return items, grade, 200
