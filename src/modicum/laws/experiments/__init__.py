"""port experiment: a study of several small runs of one proxy: a table of effects, or a mixture, with intervals.

A method is constructed as `cls(config, setting)`. `propose` is pure in the runs so far, so that a study that was
stopped asks again and goes on; no trials mean that it is finished. `conclude` is pure too. `evaluate.experiments`
trains and measures the trials. Losses are bits per byte of held-out text, by group: a group for each domain, and
those that a method adds (`groups`, `probes`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modicum.core.errors import UserError, unknown
from modicum.core.registry import Method

BASELINE = "random"
Distance = Callable[[np.ndarray], tuple[float, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Between:
    """Documents whose number in `column` lies in [low, high); those without one are out."""

    column: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """Each text `repeats` times in the run, in the stead of as many tokens, evenly over it."""

    name: str
    texts: tuple[str, ...]
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One small run. weights: of domains, None for their sizes. keep: only documents that all of these let through.
    start: the trial whose model it goes on from, "" for the study's. length: in units of the study's tokens. points:
    how often it is measured along the way, its start and end included. merge: instead of training, the mean of these
    trials' parameters."""

    name: str
    weights: Mapping[str, float] | None = None
    keep: tuple[Between, ...] = ()
    insert: tuple[Insertion, ...] = ()
    start: str = ""
    length: float = 1.0
    seed: int = 0
    points: int = 0
    merge: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trial's outcome. losses: bits per byte by group; curve: (tokens, losses) along the way; epochs: of the domain
    that was repeated most."""

    trial: Trial
    losses: Mapping[str, float]
    curve: tuple[tuple[float, Mapping[str, float]], ...] = ()
    tokens: float = 0.0
    seconds: float = 0.0
    epochs: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a study is about. domains: tokens of training text; target: weights of the groups whose mean loss counts;
    tokens: of a trial of length 1; columns: by name, the documents' (values, tokens); distance: of a mixture's text (in
    the domains' order) to the target's, with its gradient; given: whether trials go on from a given model."""

    domains: Mapping[str, float]
    target: Mapping[str, float]
    tokens: float
    seed: int = 0
    bytes_per_token: float = 4.0
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    distance: Distance | None = None
    given: bool = False

    def score(self, run: Run) -> float:
        """The target's mean loss: lower is better."""
        return sum(w * run.losses[group] for group, w in self.target.items()) / sum(self.target.values())

    def natural(self) -> np.ndarray:
        sizes = np.array([*self.domains.values()], dtype=float)
        fractions: np.ndarray = sizes / sizes.sum()
        return fractions

    def weights(self, fractions: Sequence[float] | np.ndarray) -> dict[str, float]:
        """Fractions in the domains' order as a mixture."""
        return {d: round(float(w), 6) for d, w in zip(self.domains, fractions, strict=True)}

    def domain(self, name: str) -> str:
        if name not in self.domains:
            raise unknown("domain", name, self.domains)
        return name


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """rows: the study's table. weights: the mixture chosen, if it chooses one, with the loss that it is `predicted` to
    have, between `low` and `high`. notes: sentences a reader should know."""

    rows: list[dict[str, Any]]
    weights: dict[str, float] | None = None
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    notes: tuple[str, ...] = ()


class Experiment(Method):
    """Base class: fill `propose` and `conclude`."""

    columns: tuple[str, ...] = ()  # of documents, that the method reads: "year", or a number of their metadata
    compares = False  # whether it measures distances of text (`Setting.distance`)

    def __init__(self, config: Any, setting: Setting):
        self.config, self.setting = config, setting

    @abstractmethod
    def propose(self, runs: Sequence[Run]) -> list[Trial]:
        """Trials to run next; [] when the study is finished."""

    @abstractmethod
    def conclude(self, runs: Sequence[Run]) -> Conclusion:
        """What the finished runs say."""

    @classmethod
    def reads(cls, config: Any) -> tuple[str, ...]:
        """Columns that the method reads under this config."""
        return cls.columns

    def groups(self) -> dict[str, Between]:
        """More groups of held-out documents to measure."""
        return {}

    def probes(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """More groups, of (context, text): the bits per byte of each text after its context."""
        return {}


def left(trials: Sequence[Trial], runs: Sequence[Run]) -> list[Trial]:
    """The trials that have not run."""
    done = {run.trial.name for run in runs}
    return [t for t in trials if t.name not in done]


def by_name(runs: Sequence[Run]) -> dict[str, Run]:
    return {run.trial.name: run for run in runs}


def rehearsed(experiment: Experiment) -> list[Trial]:
    """All trials of a study, from losses that are made up: how many there will be and of which length, before any runs.

    Raises `UserError` for a method that never ends."""
    setting, rng = experiment.setting, np.random.default_rng(0)
    names = [*setting.domains, *setting.target, *experiment.groups(), *experiment.probes()]
    runs: list[Run] = []
    while trials := experiment.propose(runs):
        if len(runs) > 10_000:
            raise UserError("the study proposes more than 10,000 trials; ask for fewer")
        for trial in trials:
            curve = [(at, 2 + 0.1 * rng.random(len(names))) for at in np.linspace(0, 1, trial.points)]
            runs.append(
                Run(
                    trial=trial,
                    losses=dict(zip(names, 2 + 0.1 * rng.random(len(names)), strict=True)),
                    curve=tuple(
                        (float(at) * trial.length * setting.tokens, dict(zip(names, y, strict=True))) for at, y in curve
                    ),
                    tokens=0.0 if trial.merge else trial.length * setting.tokens,
                )
            )
    return [run.trial for run in runs]
