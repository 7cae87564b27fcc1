"""compressor: the model after a method of the port compressor: pruned, with fewer layers, or quantised.

Reads the text of the corpus where the method does. `model` starts from a published model; without it the latest one of
the recipe is taken, or that of the stage that `from` names. Stopped and started again, it goes on behind the last block
that was finished.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from modicum.budget import Cost
from modicum.compress.method import compress_with, reads_text, setting_up
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.model.folder import load_config
from modicum.pipeline import costs, training
from modicum.pipeline.context import Context
from modicum.pipeline.models import folder_of
from modicum.pipeline.plan import Planner
from modicum.pipeline.section import Strict, method
from modicum.pipeline.stage import Input, Inputs, Stage, StagePlan

WEIGHTS = 4e6  # that a method works on in a second, whichever it is
WRITTEN = 200e6  # bytes per second, with their way to the disk


class Section(Strict):
    model: str | None = None  # a folder, name or hub id; None: an earlier stage's
    compressor: method("compressor") = "rtn"  # type: ignore[valid-type]
    embeddings: method("linear") | None = None  # type: ignore[valid-type]  # a form for the token embedding
    sequences: int = Field(16, ge=1)  # of text that the method reads
    length: int = Field(256, ge=2)  # tokens of each


class CompressorStage(Stage[Section]):
    order = 62
    needs, gives = ("corpus",), ("model",)

    def needed(self, section: Section) -> tuple[str, ...]:
        return ("corpus",) if section.model else ("corpus", "model")

    def models(self, section: Section) -> dict[str, str]:
        return {"model": section.model} if section.model else {}

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        source = inputs["model"] if "model" in inputs else published("compressor", section, str(section.model))
        shape = costs.subject_shape(planner, source)
        choice = Choice.parse("compressor", section.compressor)
        compose.resolve(setting_up(choice, shape, text=True))
        registry.build("compressor", choice).check(shape)
        weights, dtype = shape.parameters(), training.dtype_of(planner.recipe)
        seconds = weights / WEIGHTS + 4 * weights / WRITTEN
        if reads_text(choice):
            seconds += 3 * section.sequences * costs.forward_seconds(planner, source, dtype, 1, section.length)
        stream = 4.0 * section.sequences * section.length * shape.width
        peak = 2.0 * weights + 16.0 * weights / max(shape.layers, 1) + 2 * stream
        decisions = {key: source[key] for key in ("shape", "model", "sample")}
        cost = Cost(parameters=weights, disk_bytes=6.0 * weights + 2 * stream, seconds=seconds, peak_bytes=peak)
        return StagePlan(cost, decisions, "passes over the text timed; a general rate for the method's own work")

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        source = inputs["model"]["folder"] if "model" in inputs else str(folder_of(str(section.model)))
        folder = context.folder / "model"
        made = compress_with(
            source,
            section.compressor,
            folder,
            embeddings=section.embeddings,
            calibration=inputs["corpus"]["folder"],
            sequences=section.sequences,
            length=section.length,
            events=context.events,
        )
        shape = load_config(folder)
        return {
            "folder": str(folder),
            "parameters": shape.parameters(),
            "bytes": made.bytes,
            "error": made.error,
            "zeros": made.zeros,
            "layers": made.layers,
            "description": f"{made.form}: {shape.layers} layers, {made.bytes / 2**20:.1f} MiB of weights after "
            f"{made.original_bytes / 2**20:.1f} MiB.",
            "cost": {"parameters": made.weights},
        }

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        return Section(sequences=2, length=16), {"shape": None, "model": None, "sample": None}


def published(name: str, section: Strict, model: str) -> Input:
    """A published model as the input of a plan."""
    return Input(name, section, {"model": model, "shape": None, "sample": None})
