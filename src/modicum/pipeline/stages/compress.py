"""compress: the model that answers in fewer bytes, once for each form of the recipe."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import nn

from modicum.budget import Cost
from modicum.compress.run import compress, members, weight_bytes
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model import attach
from modicum.pipeline import costs, training
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.section import Strict, method
from modicum.pipeline.stage import Inputs, Stage, StagePlan

FIT = 2.0  # fitting and measuring what it lost, by the time of fitting alone
WRITTEN = 200e6  # bytes per second, with their way to the disk
ROWS, SEQUENCES, LENGTH = 4096, 64, 512  # inputs that each layer is fitted to, and the text they come from
MATRICES = 7  # of a layer: queries, keys, values, output, gate, up, down
TIMED = 512  # rows and columns of the matrix that a form is fitted to for the plan


class Section(Strict):
    forms: list[method("linear")] = ["int8", "int4"]  # type: ignore[valid-type]


class Compress(Stage[Section]):
    order, default = 60, True
    needs, gives = ("corpus", "model"), ("variants",)

    def check(self, section: Section, recipe: Recipe, name: str) -> None:
        (source,) = recipe.sources(name)["model"]
        left = recipe.section(source)
        if getattr(left, "base", None) is not None and not left.merge:
            raise UserError(
                f"{name} reads plain weights, and {source} leaves an adapter over {left.base}; set "
                f"{source}.merge=true, or leave {name} out"
            )
        for form in section.forms:
            compose.resolve(members(form), options={"linear": f"{name}.forms"}, where=name)

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """Each form fitted to one matrix here, and its bytes as it says them itself."""
        model = inputs["model"]
        shape = costs.subject_shape(planner, model)
        weights = shape.parameters()
        stored = seconds = largest = peak = 0.0
        dense: list[float] = []
        for form in section.forms:
            choice = Choice.parse("linear", form)
            kind: Any = registry.load("linear", choice.method).cls
            per = kind.cost(choice.config(), (shape.width, shape.width)).disk_bytes
            bytes_of = weights * per / shape.width**2
            stored, largest = stored + bytes_of, max(largest, bytes_of)
            fit, unpack, blocks = planner.once(("fit", str(choice)), partial(_seconds_per_weight, choice))
            seconds += FIT * fit * weights
            dense.append(unpack * weights)
            if _calibrated(choice):  # a pass over the calibration data, and one for every block that is sorted
                once = SEQUENCES * costs.forward_seconds(planner, model, training.dtype_of(planner.recipe), 1, LENGTH)
                seconds += once * (1 + (blocks - 1) * MATRICES * shape.layers)
                inputs_read = 2 * ROWS * (3 * shape.width + shape.mlp_width) * shape.layers
                peak = max(peak, inputs_read, 4 * weights if blocks > 1 else 0)
        seconds += stored / WRITTEN
        matrix = max(shape.vocab_size, shape.mlp_width) * shape.width  # fitted in float32, compared with what it became
        return StagePlan(
            Cost(
                parameters=weights,
                disk_bytes=stored,
                seconds=seconds,
                peak_bytes=weights * 2 + largest + 8 * matrix + peak,
            ),
            {"variants": 1 + len(section.forms), "dense_seconds": dense},
            f"each form fitted to a matrix of {TIMED}×{TIMED}",
        )

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        source = inputs["model"]["folder"]
        variants = [{"name": training.dtype_of(context.recipe), "folder": source, "bytes": weight_bytes(source)}]
        for number, form in enumerate(section.forms):
            choice = Choice.parse("linear", form)
            alike = [f for f in section.forms[:number] if Choice.parse("linear", f).method == choice.method]
            made = compress(
                source,
                form,
                context.folder / (f"{choice.method}-{number}" if alike else choice.method),
                embeddings=form if _embeds(choice) else None,
                calibration=inputs["corpus"]["folder"] if _calibrated(choice) else None,
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

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        return Section(forms=["int8"]), {}


def _seconds_per_weight(choice: Choice) -> tuple[float, float, int]:
    """Seconds to fit the form, and to make the matrix out of it again, as every pass over a text does; its blocks."""
    fit, unpack, blocks = 0.0, 0.0, 1
    inputs = {"0": torch.randn(ROWS, TIMED)} if _calibrated(choice) else None
    for _ in range(2):  # the first calls take longer
        layer = nn.Sequential(nn.Linear(TIMED, TIMED, bias=False))
        began = time.perf_counter()
        (form,) = attach.attach(layer, {"0": choice}, calibration=inputs).values()
        middle = time.perf_counter()
        form.dense()
        fit, unpack, blocks = middle - began, time.perf_counter() - middle, getattr(form, "loaded", 1)
    return fit / TIMED**2, unpack / TIMED**2, blocks


def _calibrated(choice: Choice) -> bool:
    """Whether the form is fitted to what it does for text, or has its blocks sorted by that."""
    return bool({"calibration", "elastic"} & registry.load("linear", choice.method).cls.provides)


def _embeds(choice: Choice) -> bool:
    """Whether the form can hold a token embedding: half of a small model's bytes are there."""
    kind: Any = registry.load("linear", choice.method).cls
    return "embedding" in kind.provides
