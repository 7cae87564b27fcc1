"""What holds for any experiment."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from modicum.core import registry
from modicum.laws.experiments import Run, Setting, Trial, rehearsed


def _distance(fractions: np.ndarray) -> tuple[float, np.ndarray]:
    cost = np.array([0.2, 0.5, 0.9])
    return float(fractions @ cost), cost - cost.mean()


SETTING = Setting(
    domains={"prose": 600_000.0, "code": 300_000.0, "maths": 100_000.0},
    target={"maths": 1.0, "code": 0.5},
    tokens=20_000.0,
    columns={"year": (np.arange(2000.0, 2020.0), np.ones(20))},
    distance=_distance,
)


def _make(key: str) -> Any:
    loaded = registry.load("experiment", key)
    return loaded.cls(getattr(loaded.module, "TOY", loaded.config()), SETTING)


def _outcome(trial: Trial, names: list[str]) -> Run:
    """Losses that depend on the trial's name alone, whatever the order it is run in."""
    rng = np.random.default_rng(list(trial.name.encode()))
    end = trial.length * SETTING.tokens
    curve = tuple(
        (float(x), dict(zip(names, 3 - 0.3 * math.log1p(x) / 10 + 0.01 * rng.random(len(names)), strict=True)))
        for x in np.linspace(0, end, trial.points)
    )
    losses = dict(zip(names, 2 + rng.random(len(names)), strict=True))
    return Run(trial=trial, losses=losses, curve=curve, tokens=end)


def _run(experiment: Any, batches: bool) -> list[Run]:
    """All runs; one at a time, or as many as are proposed."""
    names = [*SETTING.domains, *experiment.groups(), *experiment.probes()]
    runs: list[Run] = []
    while trials := experiment.propose(runs):
        assert len(runs) < 1000, "it never ends"
        runs += [_outcome(t, names) for t in (trials if batches else trials[:1])]
    return runs


def check_resumes(key: str) -> None:
    """Stopped after any trial, a study goes on with the same ones, and comes to the same conclusion."""
    whole, single = _run(_make(key), True), _run(_make(key), False)
    assert [asdict(r.trial) for r in whole] == [asdict(r.trial) for r in single], f"{key}: other trials after a stop"
    assert repr(_make(key).conclude(whole)) == repr(_make(key).conclude(single)), f"{key}: another conclusion"


def check_trials(key: str) -> None:
    """Names are unique, weights are of known domains, and what a trial starts from or merges has run before."""
    done: set[str] = set()
    for run in _run(_make(key), True):
        t = run.trial
        assert t.name not in done, f"{key}: two trials are called {t.name}"
        assert t.length > 0, f"{key}: {t.name} has no length"
        assert set(t.weights or {}) <= set(SETTING.domains), f"{key}: {t.name} names unknown domains"
        assert t.weights is None or (min(t.weights.values()) >= 0 and sum(t.weights.values()) > 0), f"{key}: {t.name}"
        assert {*t.merge, *([t.start] if t.start else [])} <= done, f"{key}: {t.name} needs a trial that has not run"
        done.add(t.name)


def check_concludes(key: str) -> None:
    """A table with rows alike; a mixture, if one is chosen, has known domains and some weight; its interval is one."""
    experiment = _make(key)
    conclusion = experiment.conclude(_run(experiment, True))
    assert conclusion.rows and len({tuple(r) for r in conclusion.rows}) <= 2, f"{key}: no table"
    if conclusion.weights is not None:
        assert set(conclusion.weights) <= set(SETTING.domains), f"{key}: {conclusion.weights}"
        assert min(conclusion.weights.values()) >= 0 and sum(conclusion.weights.values()) > 0, f"{key}: no weight"
    if conclusion.low is not None:
        assert conclusion.low <= conclusion.predicted <= conclusion.high, f"{key}: {conclusion}"


def check_estimate(key: str) -> None:
    """The number and lengths of trials are known before any has run."""
    planned = [(t.name, t.length) for t in rehearsed(_make(key))]
    run = [(r.trial.name, r.trial.length) for r in _run(_make(key), True)]
    assert len(planned) == len(run), f"{key}: {len(planned)} trials were planned and {len(run)} run"
    assert sum(length for _, length in planned) <= 1.5 * sum(length for _, length in run), f"{key}: planned lengths"
