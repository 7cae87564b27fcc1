"""compress: the model that answers in fewer bytes, once for each form of the recipe."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from torch import nn

from modicum.budget import Cost
from modicum.compress.run import compress, weight_bytes
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.model import attach
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.models import answering
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe

FIT = 2.0  # fitting and measuring what it lost, by the time of fitting alone
WRITTEN = 200e6  # bytes per second, with their way to the disk
TIMED = 512  # rows and columns of the matrix that a form is fitted to for the plan


def needs(recipe: Recipe) -> tuple[str, ...]:
    return ("curate", answering(recipe))


def uses(recipe: Recipe) -> dict[str, Any]:
    assert recipe.compress
    return {"compress": recipe.compress.model_dump()}


def plan(planner: Planner) -> StagePlan:
    """Each form fitted to one matrix here, and its bytes as it says them itself."""
    recipe = planner.recipe
    assert recipe.compress
    shape = training.subject_shape(planner)
    weights = shape.parameters()
    stored = seconds = largest = 0.0
    dense: list[float] = []
    for form in recipe.compress.forms:
        choice = Choice.parse("linear", form)
        kind: Any = registry.load("linear", choice.method).cls
        per = kind.cost(choice.config(), (shape.width, shape.width)).disk_bytes
        bytes_of = weights * per / shape.width**2
        stored, largest = stored + bytes_of, max(largest, bytes_of)
        fit, unpack = planner.once(("fit", str(choice)), partial(_seconds_per_weight, choice))
        seconds += FIT * fit * weights
        dense.append(unpack * weights)
    seconds += stored / WRITTEN
    matrix = max(shape.vocab_size, shape.mlp_width) * shape.width  # fitted in float32, and compared with what it became
    return StagePlan(
        Cost(parameters=weights, disk_bytes=stored, seconds=seconds, peak_bytes=weights * 2 + largest + 8 * matrix),
        {"dense_seconds": dense},
        f"each form fitted to a matrix of {TIMED}×{TIMED}",
    )


def _seconds_per_weight(choice: Choice) -> tuple[float, float]:
    """Seconds to fit the form, and to make the matrix out of it again, as every pass over a text does."""
    fit = unpack = 0.0
    for _ in range(2):  # the first calls take longer
        layer = nn.Sequential(nn.Linear(TIMED, TIMED, bias=False))
        began = time.perf_counter()
        (form,) = attach.attach(layer, {"0": choice}).values()
        middle = time.perf_counter()
        form.dense()
        fit, unpack = middle - began, time.perf_counter() - middle
    return fit / TIMED**2, unpack / TIMED**2


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.compress
    source = context.figures(answering(recipe))["folder"]
    variants = [{"name": recipe.pretrain.dtype, "folder": source, "bytes": weight_bytes(source)}]
    for form in recipe.compress.forms:
        choice = Choice.parse("linear", form)
        made = compress(
            source,
            form,
            context.folder / choice.method,
            embeddings=form if _embeds(choice) else None,
            calibration=context.figures("curate")["folder"] if _in_blocks(choice) else None,
            events=context.events,
        )
        variants.append(
            {
                "name": str(choice),
                "folder": made.folder,
                "bytes": made.bytes,
                "error": made.error,
                "bits_per_weight": made.bits_per_weight,
            }
        )
    return {"variants": variants, "cost": {"parameters": made.weights}}


def _in_blocks(choice: Choice) -> bool:
    """Whether the form is sorted by what its parts do for text."""
    kind: Any = registry.load("linear", choice.method).cls
    return "elastic" in kind.provides


def _embeds(choice: Choice) -> bool:
    """Whether the form can hold a token embedding: half of a small model's bytes are there."""
    kind: Any = registry.load("linear", choice.method).cls
    return "embedding" in kind.provides
