"""export: the model for other programs: a GGUF file for llama.cpp, or a dense Hugging Face folder.

Adapters and quantised forms are merged in first. Tensors whose rows are not whole blocks of the type asked for are
refused, unless `fallback` names a type for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from modicum.budget import Cost
from modicum.compress import export
from modicum.core.files import tree_bytes
from modicum.model.folder import load_model
from modicum.model.gguf.write import Types
from modicum.pipeline import costs
from modicum.pipeline.context import Context
from modicum.pipeline.plan import Planner
from modicum.pipeline.section import Strict
from modicum.pipeline.stage import Inputs, Stage, StagePlan

WEIGHTS = 10e6  # quantised and written in a second


class Section(Strict):
    format: Literal["gguf", "hf"] = "gguf"
    type: str = "q8_0"  # of the layers' matrices in GGUF
    embeddings: str | None = None  # of token embedding and head; None: q8_0 below a quantised type
    fallback: str | None = None  # for rows that are not whole blocks of `type`


class Export(Stage[Section]):
    order = 64
    needs, gives = ("model",), ("model",)

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        Types(matrices=section.type, embeddings=section.embeddings, fallback=section.fallback)
        source = inputs["model"]
        weights = costs.subject_shape(planner, source).parameters()
        decisions = {key: source[key] for key in ("shape", "model", "sample")}
        cost = Cost(parameters=weights, disk_bytes=4.0 * weights, seconds=weights / WEIGHTS, peak_bytes=6.0 * weights)
        return StagePlan(cost, decisions, "a general rate for quantising and writing")

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        source = Path(inputs["model"]["folder"])
        model = load_model(source)
        grids = export.merged(model)
        if section.format == "hf":
            out = context.folder / "model"
            export.write_folder(model, out, source)
            size, what = tree_bytes(out), f"Hugging Face folder in {str(model.dtype).removeprefix('torch.')}"
        else:
            types = Types(matrices=section.type, embeddings=section.embeddings, fallback=section.fallback)
            planned = export.plan(model, types, source)
            out = context.folder / "model.gguf"
            export.write(model, out, types, planned, source.name, grids)
            size, what = out.stat().st_size, f"GGUF, {section.type}, {planned.bits:.2f} bits per weight"
        parameters = model.config.parameters()
        return {
            "folder": str(out),
            "parameters": parameters,
            "bytes": size,
            "description": f"{what}: {size / 2**20:.1f} MiB.",
            "cost": {"parameters": parameters},
        }

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        return Section(format=section.format), {}
