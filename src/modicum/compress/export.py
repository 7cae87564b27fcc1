"""A model for other programs: one GGUF file for llama.cpp and its relatives, or a plain Hugging Face folder.

Linear forms (adapters, quantised weights) are merged into dense matrices first, so that nothing of this package is
needed to read what is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.core.events import Progress
from modicum.data.gguf_vocabulary import vocabulary
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.decoder import Decoder
from modicum.model.folder import TOKENIZER_FILES, save_model
from modicum.model.gguf import architectures
from modicum.model.gguf import write as gguf
from modicum.model.gguf.quantize import TYPES
from modicum.model.gguf.write import Stored, Types
from modicum.model.linear.affine import Affine
from modicum.model.linear.int4 import Int4


@dataclass(frozen=True)
class Row:
    """Tensors of one kind with the same storage type. bits: per weight, scales included."""

    tensors: str
    type: str
    count: int
    weights: int
    bytes: int
    bits: float
    why: str


Grids = dict[str, tuple[Tensor, Tensor]]


def merged(model: Decoder) -> Grids:
    """Merge every linear form of `model`. Raises `UserError` for forms that are not linear.

    Returned is, by parameter, the grid of those in four bits: step and minimum of each block of 32, (O, I / 32).
    """
    grids: Grids = {}
    with torch.no_grad():
        for name, form in attach.forms(model).items():
            four = isinstance(form, Int4) or (isinstance(form, Affine) and form.bits == 4)
            if isinstance(form, Int4 | Affine) and four and form.group % 32 == 0 and form.in_features % 32 == 0:
                step_OB, zero_OB = (
                    x.float().repeat_interleave(form.group // 32, 1)[:, : form.in_features // 32].cpu()
                    for x in (form.scale, form.zero)
                )
                grids[f"{name}.weight"] = step_OB, zero_OB - 8 * step_OB
        attach.merge(model)
    return grids


def table(stored: Iterable[Stored]) -> list[Row]:
    """The tensors to be stored, by kind and type, in the file's order."""
    groups: dict[tuple[str, str, str], list[Stored]] = {}
    for item in stored:
        parts = item.name.split(".")
        kind = "norms and biases" if len(item.shape) < 2 else parts[2] if parts[0] == "blk" else parts[0]
        groups.setdefault((kind, item.type, item.why), []).append(item)
    return [
        Row(kind, name, len(items), sum(i.weights for i in items), sum(i.bytes for i in items), TYPES[name].bits, why)
        for (kind, name, why), items in groups.items()
    ]


@dataclass(frozen=True)
class Plan:
    """A GGUF file before it is written: tensor types, the tokenizer's metadata, and notes on what is lost."""

    rows: list[Row]
    vocabulary: dict[str, Any] | None
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"bytes": self.bytes, "bits_per_weight": self.bits, "notes": self.notes, "tensors": rows}

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def bits(self) -> float:
        """Per weight, over all tensors."""
        return 8 * self.bytes / sum(row.weights for row in self.rows)


def plan(model: Decoder, types: Types, tokenizer: Path | None) -> Plan:
    """What `write` will do with a merged model and the tokenizer of a folder (None: prompts are token ids)."""
    stored = gguf.plan(model, types)
    notes = architectures.notes(model.config, architectures.require(model.config))
    words = None
    if tokenizer is not None:
        words, more = vocabulary(Tokenizer.load(tokenizer), model.config.vocab_size)
        notes += more
    return Plan(table(stored), words, notes)


def write(model: Decoder, out: Path, types: Types, planned: Plan, name: str, grids: Grids | None = None) -> None:
    """Write the file that was planned, with a progress line; `grids` as `merged` gives them."""
    with Progress(f"export {out.name}", sum(row.weights for row in planned.rows), "weights") as progress:
        gguf.write(model, out, types, vocabulary=planned.vocabulary, name=name, grids=grids, progress=progress.update)


def write_folder(model: Decoder, out: Path, source: Path) -> None:
    """Write a merged model as a Hugging Face folder with the tokenizer files of `source`, if it has any."""
    if out.is_file():
        raise UserError(f"{out} is a file; give the folder to write")
    has_tokenizer = any((source / name).is_file() for name in TOKENIZER_FILES)
    save_model(model, out, source if has_tokenizer else None)
