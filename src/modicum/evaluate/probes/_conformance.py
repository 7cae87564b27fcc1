"""What must hold for any probe: it keeps its budget, repeats itself, finds what is there and little else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.evaluate.probes import Asked, Graded, Grader, Probe, Report


def _probe(key: str) -> Probe:
    loaded = registry.load("probe", key)
    probe: Probe = loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config())
    return probe


class Counted:
    def __init__(self, grade: Grader):
        self.grade, self.count = grade, 0

    def __call__(self, prompts: Sequence[Asked]) -> list[Graded]:
        self.count += len(prompts)
        return self.grade(prompts)


def _run(key: str, seed: int, effect: bool) -> tuple[Report, int, int]:
    items, grade, budget = _probe(key).simulate(np.random.default_rng(seed), effect)
    counted = Counted(grade)
    return _probe(key).run(items, counted, budget, seed), counted.count, budget


def check_keeps_its_budget(key: str) -> None:
    for seed in range(3):
        report, spent, budget = _run(key, seed, True)
        assert spent <= budget, f"{spent} gradings were asked for, the budget is {budget}"
        assert report.graded == spent, f"the report says {report.graded} gradings, there were {spent}"


def check_same_seed_same_report(key: str) -> None:
    first, again = _run(key, 5, True)[0], _run(key, 5, True)[0]
    assert first == again, "the same seed and model gave another report"


def check_finds_what_is_planted(key: str) -> None:
    detections = [_run(key, seed, True)[0].detected for seed in range(10)]
    assert sum(detections) >= 8, f"the planted effect was found in {sum(detections)} of 10 simulated models"


def check_false_alarms(key: str) -> None:
    detections = [_run(key, seed, False)[0].detected for seed in range(100, 140)]
    assert sum(detections) <= 5, f"{sum(detections)} of 40 models without the effect raised an alarm; 5% are allowed"


def check_figures_have_intervals(key: str) -> None:
    report = _run(key, 1, True)[0]
    assert report.verdict and report.figures
    for name, figure in report.figures.items():
        assert figure["low"] <= figure["value"] + 1e-9 and figure["value"] <= figure["high"] + 1e-9, (name, figure)


def check_too_small_a_budget_is_refused(key: str) -> None:
    items, grade, _ = _probe(key).simulate(np.random.default_rng(0), True)
    for prompts, budget in (([], 1000), (items, 0)):
        try:
            _probe(key).run(prompts, grade, budget, 0)
        except (UserError, ValueError):
            continue
        raise AssertionError(f"{len(prompts)} items and a budget of {budget} were accepted")
