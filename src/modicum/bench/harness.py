"""Measuring a port's methods beside its baseline, at equal budget, over several seeds, in one run.

A port's bench, `bench/ports/PORT.py`, holds

    AXES = Axes(quality=Axis("bits_per_byte"), cost=Axis("state_bytes", "lower", "bytes"))
    LIMITS = {"tokens", "seconds"}       limits of a Budget that `measure` keeps
    class Scale                          keyword-only dataclass: how large a measurement is
    QUICK = Scale(...)                   seconds instead of minutes
    TIER = "laptop"                      what the default scale amounts to (optional, see `labs.tier_of`)
    def tier(scale) -> str               what any other scale amounts to (optional)
    MODEL = "smollm2"                    what is measured unless --quick or --model says otherwise (optional)
    NOT_MEASURABLE = {"key": "reason"}   methods that this bench cannot measure (optional, a literal)
    def measure(choice, seed, settings) -> Measurement

    def axes_of(choice) -> Axes          only where methods of one port are judged on different axes

`measure` runs one method once. All of its randomness comes from `seed`, so that two methods at one seed
see the same data in the same order from the same start; differences are then taken pair by pair.

A method that must be measured in a way of its own brings `_PORT_KEY.py` beside that file, with a `measure` that is
called instead of the port's.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from modicum.bench import code, labs
from modicum.bench import record as records
from modicum.bench.card import bench_path, not_measurable, own_bench_path, read_card
from modicum.bench.labs import Lab
from modicum.bench.measurement import Axes, Measurement, Settings
from modicum.bench.record import Record
from modicum.budget import Budget, Meter
from modicum.core import registry
from modicum.core.choice import Choice, make_config
from modicum.core.errors import UserError, unknown
from modicum.core.events import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """A loaded bench file."""

    port: str
    axes: Axes
    scale: type
    quick: Any
    limits: frozenset[str]
    axes_of: Callable[[Choice], Axes]
    measure: Callable[[Choice, int, Settings], Measurement]
    module: ModuleType

    @property
    def model(self) -> str | None:
        """The model that is measured where no other is asked for; None: a small one trained by the bench."""
        return getattr(self.module, "MODEL", None)


def benches() -> dict[str, Path]:
    """Ports that have a bench, and its file; nothing is imported."""
    return {port: path for port in registry.ports() if (path := bench_path(port)).exists()}


def load(port: str) -> Bench:
    """Import a port's bench. Raises `UserError` for an unknown port or one without a bench."""
    info, path = registry.port(port), bench_path(port)
    if port not in benches():
        raise unknown("bench", port, benches(), f"Write {path}")
    own = path.is_relative_to(registry.ROOT)
    module = importlib.import_module(f"modicum.bench.ports.{path.stem}" if own else f"{info.package}.{path.stem}")
    missing = [n for n in ("AXES", "Scale", "QUICK", "measure") if not hasattr(module, n)]
    if missing:
        raise UserError(f"{module.__file__} lacks {', '.join(missing)}; see modicum.bench.harness")
    return Bench(
        port,
        module.AXES,
        module.Scale,
        module.QUICK,
        frozenset(getattr(module, "LIMITS", ())),
        getattr(module, "axes_of", lambda choice: module.AXES),
        module.measure,
        module,
    )


def make_scale(bench: Bench, quick: bool, changes: dict[str, Any]) -> Any:
    """The bench's default scale, or its quick one, with `changes` type-checked on top."""
    start = asdict(bench.quick if quick else bench.scale())
    return make_config(bench.scale, start | changes, f"bench {bench.port}")


def check_budget(bench: Bench, budget: Budget) -> dict[str, float]:
    """The limits that are set. Raises `UserError` for one that the bench does not keep."""
    limits = {k: v for k, v in asdict(budget).items() if v is not None}
    for name in limits:
        if name not in bench.limits:
            allowed = ", ".join(sorted(bench.limits)) or "none: its budget is its scale, see --scale"
            raise UserError(f"bench {bench.port} cannot hold methods to a limit of {name}. Allowed: {allowed}")
    return limits


def pick(port: str, given: list[str]) -> list[Choice]:
    """Choices to measure: the baseline first, then those given, or every method of the port.

    A method whose paper's defaults say nothing at a bench's size names its own settings in a module
    constant, `SWEEP = {"window": (64, 256)}`; they are measured when the port is measured as a whole. Methods with a
    reason not to be measured (`card.not_measurable`) are left out then.
    """
    baseline = registry.port(port).baseline
    if not given:
        for key, info in registry.methods(port).items():
            if not_measurable(info):
                continue
            swept = [f"{key}:{knobs}" for knobs in read_card(info).sweep] or [key]
            try:
                for text in swept:
                    Choice.parse(port, text).config()
            except UserError as error:  # it cannot do without knobs of the user's own
                log.warning("left out: %s", error)
            else:
                given = given + swept
    choices = [Choice.parse(port, g) for g in given]
    for choice in choices:
        choice.config()  # a wrong knob is refused before anything is measured
    if Choice(port, baseline) not in choices:
        choices.insert(0, Choice(port, baseline))
    unique = {str(c): c for c in choices}
    return sorted(unique.values(), key=lambda c: str(c) != baseline)


@dataclass
class Outcome:
    """Records of this run, new and taken from earlier, and what failed."""

    lab: Lab
    records: list[Record]
    failures: dict[str, str]
    measured: int = 0
    skipped: int = 0
    interrupted: bool = False


def lab_of(bench: Bench, settings: Settings) -> Lab:
    """The lab that a measurement with these settings belongs to. Raises `UserError` for a limit it does not keep."""
    return Lab.of(
        bench.port,
        tier=tier_of(bench, settings),
        device=settings.device,
        bench=code.bench_hash(bench.port),
        scale=asdict(settings.scale),
        budget=check_budget(bench, settings.budget),
        data=settings.data,
        model=settings.model,
    )


def tier_of(bench: Bench, settings: Settings) -> str:
    """`labs.tier_of` these settings; what the bench declares holds for its default scale and its own model."""
    as_declared = settings.scale == bench.scale() and settings.model == bench.model
    other = getattr(bench.module, "tier", None)
    declared = getattr(bench.module, "TIER", None) if as_declared else other(settings.scale) if other else None
    return labs.tier_of(
        settings.scale, quick=settings.quick, model=settings.model, device=settings.device, declared=declared
    )


def fits(lab: Lab, bench: Bench, settings: Settings) -> bool:
    """Whether a lab answers what these settings ask, whoever measured in it and with which version of the bench.

    The bench's own settings ask for any lab above smoke: where one scale does not suit all methods there are several.
    Others ask for themselves: data and model that the person gave are compared by their contents, the bench's own model
    by its name, its own data (the Python installation's) by nothing, so that records of another machine answer as well.
    """
    tier, limits = tier_of(bench, settings), check_budget(bench, settings.budget)
    if settings == Settings(scale=bench.scale(), model=bench.model) and tier != "smoke":
        return lab.tier != "smoke"
    if (lab.tier, lab.device == "cuda", lab.budget) != (tier, settings.device.startswith("cuda"), limits):
        return False
    model = lab.inputs.get("model", {})
    if settings.model == bench.model:
        same = model.get("name") == bench.model
    else:
        same = model == (labs.model_of(settings.model) if settings.model else {})
    same = same and (settings.data is None or lab.inputs["data"] == labs.data_of(settings.data))
    return same and lab.scale == labs.plain(asdict(settings.scale))


def run(
    bench: Bench,
    choices: list[Choice],
    seeds: list[int],
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    again: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Measure every choice at every seed and append each record to its file in `folder` as it is made.

    All methods run at one seed before the next seed begins, so that an interrupted bench still holds
    complete pairs. Records of the same lab and of today's code are taken from `folder` instead of measured: the
    baseline's, unless `again`, and with `resume` everyone's. A method that fails is reported and the others
    go on; Ctrl-C ends the run and keeps what is done.
    """
    lab, machine = lab_of(bench, settings), records.machine()
    baseline = registry.port(bench.port).baseline
    codes = {c.method: code.code_hash(bench.port, c.method) for c in choices}
    known = {
        (r.choice, r.seed): r
        for r in records.read(folder, bench.port)
        if r.lab.id == lab.id and r.code == codes.get(r.method) and (resume or (r.choice == baseline and not again))
    }
    outcome = Outcome(lab, [], {})
    todo = [(seed, choice) for seed in seeds for choice in choices]
    claims = {c.method: read_card(registry.methods(bench.port)[c.method]).claim for c in choices}
    if progress:
        progress.resume_at(sum((str(choice), seed) in known for seed, choice in todo))
    for seed, choice in todo:
        label = str(choice)
        if label in outcome.failures:
            continue
        if (label, seed) in known:
            outcome.records.append(known[label, seed])
            outcome.skipped += 1
            continue
        if progress:
            progress.update(0, method=label, seed=seed)
        try:
            made = _measure(bench, choice, seed, settings)
        except KeyboardInterrupt:
            outcome.interrupted = True
            break
        except Exception as error:
            if label == baseline:
                raise
            log.debug("%s failed", label, exc_info=True)
            outcome.failures[label] = f"{type(error).__name__}: {error}"
            continue
        entry = Record(
            lab=lab,
            method=choice.method,
            choice=label,
            knobs={k: v for k, v in choice.resolved().items() if k != "method"},
            baseline=baseline,
            seed=seed,
            code=codes[choice.method],
            model=made.model,
            data=made.data,
            metrics={k: float(v) for k, v in made.metrics.items()},
            seconds=made.cost.seconds,
            peak_bytes=made.cost.peak_bytes,
            flops=made.cost.flops,
            axes=asdict(made.axes or bench.axes_of(choice)),
            machine=machine,
            versions=records.versions(),
            commit=records.commit(),
            claim=claims[choice.method],
            time=datetime.datetime.now(datetime.UTC).isoformat(),
        )
        _check_axes(entry)
        records.append(folder, entry)
        outcome.records.append(entry)
        outcome.measured += 1
        if progress:
            judged = entry.axes["quality"]["metric"]
            progress.update(1, **{judged: entry.value(judged)})
    return outcome


def _measure(bench: Bench, choice: Choice, seed: int, settings: Settings) -> Measurement:
    gc.collect()
    with Meter() as meter:
        made = measure_of(bench, choice)(choice, seed, settings)
    cost = dataclasses.replace(
        made.cost,
        seconds=made.cost.seconds or meter.seconds,
        peak_bytes=made.cost.peak_bytes or meter.peak_bytes,
    )
    return dataclasses.replace(made, cost=cost)


def measure_of(bench: Bench, choice: Choice) -> Callable[[Choice, int, Settings], Measurement]:
    """The method's own `measure`, or the port's."""
    path = own_bench_path(bench.port, choice.method)
    if not path.exists():
        return bench.measure
    own = importlib.import_module(f"{bench.module.__name__.rpartition('.')[0]}.{path.stem}")
    measure: Callable[[Choice, int, Settings], Measurement] = own.measure
    return measure


def _check_axes(entry: Record) -> None:
    for axis in entry.axes.values():
        try:
            entry.value(axis["metric"])
        except KeyError:
            raise UserError(
                f"bench {entry.lab.port} promises {axis['metric']!r} and measured only {', '.join(entry.metrics)}"
            ) from None
