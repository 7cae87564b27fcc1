"""probe: how often a probe finds the effect that it looks for, and how often it sees one that is not there.

Without a model: simulated models with and without the effect (each probe's own `simulate`), `detected` and
`false_alarms` as shares of them. With --model and --data FOLDER: the probe on the first questions of a multiple-choice
task; `found` is 1 if it says that the effect is there, and its figures stand beside.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.bench import fixtures
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.files import fingerprint

AXES = Axes(quality=Axis("detected", "higher"), cost=Axis("graded", "lower", "items"))
REAL = Axes(quality=Axis("found", "higher"), cost=Axis("graded", "lower", "items"))


@dataclass(frozen=True, kw_only=True)
class Scale:
    models: int = 50  # simulated, with the effect and without it
    task: str = "arc-easy"  # asked of a model given with --model
    items: int = 300
    budget: int = 3000  # gradings


QUICK = Scale(models=4, items=20, budget=200)


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    if settings.model:
        return ask(choice, seed, settings)
    probe = registry.build("probe", choice)
    start, graded = time.perf_counter(), []
    verdicts: dict[bool, list[bool]] = {True: [], False: []}
    for i, effect in itertools.product(range(scale.models), (True, False)):
        items, grade, budget = probe.simulate(np.random.default_rng([seed, i, effect]), effect)
        report = probe.run(items, grade, budget, seed)
        verdicts[effect].append(report.detected)
        graded.append(report.graded)
    metrics = {
        "detected": float(np.mean(verdicts[True])),
        "false_alarms": float(np.mean(verdicts[False])),
        "graded": float(np.mean(graded)),
    }
    data = {"name": "simulated models", "checksum": fingerprint([scale.models, seed])}
    return Measurement(metrics=metrics, cost=Cost(seconds=time.perf_counter() - start), data=data)


def ask(choice: Choice, seed: int, settings: Settings) -> Measurement:
    from modicum.data.tokenizer import Tokenizer
    from modicum.evaluate import probes
    from modicum.evaluate.answer import Answerer
    from modicum.evaluate.kept import Kept
    from modicum.model.folder import find_folder, load_model

    scale: Scale = settings.scale
    if settings.data is None:
        raise UserError("a probe of a model needs questions: give --data FOLDER with files such as arc_easy.parquet")
    file = Path(settings.data) / f"{scale.task.replace('-', '_')}.parquet"
    task = registry.build("task", f"{scale.task}:file={file},shuffle=true")
    items = probes.items_of(task.docs("test", scale.items, seed))
    folder = find_folder(str(settings.model))
    model = load_model(folder).eval()
    probe = registry.build("probe", choice)
    grade = probes.grader_of(probe, Answerer(model, Tokenizer.load(folder)), Kept(), [str(folder)])
    start = time.perf_counter()
    report = probe.run(items, grade, scale.budget, seed)
    metrics: dict[str, Any] = {"found": float(report.detected), "graded": float(report.graded)}
    for name, figure in report.figures.items():
        metrics[name] = figure["value"]
        metrics |= {f"{name}_low": figure["low"], f"{name}_high": figure["high"]}
        if "p" in figure:
            metrics[f"{name}_p"] = figure["p"]
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=time.perf_counter() - start),
        model=fixtures.model_record(model, str(settings.model)),
        data={"name": f"{scale.task}, seed {seed}", "checksum": fingerprint([i.id for i in items])},
        axes=REAL,
    )
