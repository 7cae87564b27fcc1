"""compress: the pretrained model in fewer bytes, once for each form of the recipe."""

from __future__ import annotations

from typing import Any

from modicum.budget import Cost
from modicum.compress.run import compress, weight_bytes
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.pipeline import training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner, StagePlan
from modicum.pipeline.recipe import Recipe

NEEDS = ("curate", "pretrain")
RATE = 40e6  # weights fitted per second by round-to-nearest forms; a form that takes longer says so in its cost


def uses(recipe: Recipe) -> dict[str, Any]:
    assert recipe.compress
    return {"compress": recipe.compress.model_dump()}


def plan(planner: Planner) -> StagePlan:
    recipe = planner.recipe
    assert recipe.compress
    shape = training.main_shape(planner)
    weights = shape.parameters()
    stored = 0.0
    for form in recipe.compress.forms:
        choice = Choice.parse("linear", form)
        kind: Any = registry.load("linear", choice.method).cls
        per = kind.cost(choice.config(), (shape.width, shape.width)).disk_bytes
        stored += weights * per / shape.width**2
    return StagePlan(
        Cost(
            parameters=weights,
            disk_bytes=stored,
            seconds=len(recipe.compress.forms) * weights / RATE,
            peak_bytes=weights * 6,
        ),
        {},
        "weights and one layer in float32 at a time",
    )


def run(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.compress
    source = context.figures("pretrain")["folder"]
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
    return {"variants": variants, "cost": {"parameters": context.figures("pretrain")["parameters"]}}


def _in_blocks(choice: Choice) -> bool:
    """Whether the form is sorted by what its parts do for text."""
    kind: Any = registry.load("linear", choice.method).cls
    return "elastic" in kind.provides


def _embeds(choice: Choice) -> bool:
    """Whether the form can hold a token embedding: half of a small model's bytes are there."""
    kind: Any = registry.load("linear", choice.method).cls
    return "embedding" in kind.provides
