"""Models of any size: any number of bytes makes a model, the more the better.

An elastic form (`linear._elastic.Elastic`) holds its weight as blocks, of which the first few alone are a coarser
weight. A folder keeps the blocks of all layers in one file, the most useful first, so that a model of
N bytes is what is always needed and the first blocks that fit:

    model = load_model(folder, size=24 << 20)        # 24 MiB of weights
    resize(model, folder, 40 << 20)                  # reads the blocks that are missing, and nothing else
    resize(model, folder, 16 << 20)                  # drops blocks, reads nothing

Every layer keeps at least its first block. Which block comes when is measured when the folder is made
(`compress.stacking`); without that, all layers' first blocks come before all second ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.budget.units import bytes_text
from modicum.core.errors import CorruptError, UserError
from modicum.model.linear import unique_tensors
from modicum.model.linear._elastic import Elastic
from modicum.model.safetensor import Item, SafetensorsFile

BLOCKS_FILE = "modicum-blocks.safetensors"


def elastic_forms(model: nn.Module) -> dict[str, Elastic]:
    """Every elastic form of `model` by module name, those below an adapter included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Elastic)}


def block_bytes(forms_of: Mapping[str, Elastic], blocks: Mapping[str, int]) -> int:
    """Bytes of so many blocks of each form."""
    return sum(form.block_nbytes(i) for name, form in forms_of.items() for i in range(blocks[name]))


def ranking(forms_of: Mapping[str, Elastic], loaded: bool = False) -> list[tuple[str, int]]:
    """(module, block) of every available (or held) block, the most useful first."""
    counts = {name: form.loaded if loaded else form.available for name, form in forms_of.items()}
    blocks = [(name, i) for name, n in counts.items() for i in range(n)]
    if all(len(form.order) >= counts[name] for name, form in forms_of.items()):
        return sorted(blocks, key=lambda block: forms_of[block[0]].order[block[1]])
    return sorted(blocks, key=lambda block: block[1])  # stable: within a level, by module


def nbytes(model: nn.Module) -> int:
    """Bytes of the weights as they are now: parameters and persistent buffers, each once."""
    return sum(tensor.nbytes for tensor in unique_tensors(model).values())


def block_items(model: nn.Module) -> dict[str, Item]:
    """The held blocks as a file keeps them, by tensor name, the most useful first."""
    forms_of = elastic_forms(model)
    items: dict[str, Item] = {}
    for name, i in ranking(forms_of, loaded=True):
        block: Tensor = getattr(forms_of[name], f"block_{i}")
        items[f"{name}.block_{i}"] = (f"{name}.block_{i}", tuple(block.shape), block.dtype, block.detach)
    return items


def emptied(description: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's description of forms with every elastic one empty, so that making the forms takes no room."""

    def entry(old: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if old is None:
            return None
        layout = old.get("layout") or {}
        if "blocks" in layout:
            layout = {**layout, "blocks": 0, "available": layout["blocks"]}
        return {**old, "layout": layout, "base": entry(old.get("base"))}

    return {**description, "forms": {name: entry(old) for name, old in description.get("forms", {}).items()}}


@dataclass(frozen=True)
class Resized:
    """bytes: of the model's weights now; blocks held, of those the file has; bytes read and dropped."""

    bytes: int
    blocks: int
    available: int
    read_bytes: int
    dropped_bytes: int


def fitting(forms_of: Mapping[str, Elastic], budget: float | None, what: str, loaded: bool = False) -> dict[str, int]:
    """How many available (or held) blocks of each form fit into `budget` bytes, the most useful first.

    Raises `UserError` with `what` if not one of each does.
    """
    wanted = dict.fromkeys(forms_of, 0)
    taken = 0
    for name, i in ranking(forms_of, loaded):
        taken += forms_of[name].block_nbytes(i)
        if budget is not None and taken > budget:
            break
        wanted[name] = i + 1
    if not all(wanted.values()):
        raise UserError(what)
    return wanted


@torch.no_grad()
def resize(model: nn.Module, folder: str | Path, size: float | None = None) -> Resized:
    """Let `model`, loaded from `folder`, take at most `size` bytes (None: all there is), in place.

    Reads from the folder only the blocks that are missing. A failure on the way leaves a model that is whole,
    of a size in between. Raises `UserError` where there are no blocks and for a size that is too small,
    `CorruptError` for a damaged file.
    """
    forms_of, path = elastic_forms(model), Path(folder) / BLOCKS_FILE
    if not forms_of:
        raise UserError(
            f"the model of {folder} is of one size only; make one of any size with: modicum "
            "compress MODEL --form bitstack --calibration TEXT --out STACK"
        )
    fixed = nbytes(model) - block_bytes(forms_of, {name: form.loaded for name, form in forms_of.items()})
    least = fixed + block_bytes(forms_of, dict.fromkeys(forms_of, 1))
    whole = fixed + block_bytes(forms_of, {name: form.available for name, form in forms_of.items()})
    wanted = fitting(
        forms_of,
        None if size is None else size - fixed,
        f"{bytes_text(size or 0)} is too small for {folder}: one block of each layer and what "
        f"is not in blocks take {bytes_text(least)}, all blocks {bytes_text(whole)}",
    )
    read = dropped = 0
    for name, form in forms_of.items():
        if wanted[name] < form.loaded:
            dropped += sum(form.block_nbytes(i) for i in range(wanted[name], form.loaded))
            form.set_layout({"blocks": wanted[name]})
    missing = [(name, i) for name, i in ranking(forms_of) if forms_of[name].loaded <= i < wanted[name]]
    if missing:
        if not path.exists():
            raise CorruptError(f"{folder} describes blocks but lacks {BLOCKS_FILE}; write the folder again")
        with SafetensorsFile(path) as file:
            for name, i in missing:
                read += _read(file, name, i, forms_of[name])
    return Resized(
        nbytes(model),
        sum(form.loaded for form in forms_of.values()),
        sum(form.available for form in forms_of.values()),
        read,
        dropped,
    )


def _read(file: SafetensorsFile, name: str, i: int, form: Elastic) -> int:
    tensor = f"{name}.block_{i}"
    complete = tensor in file.names and (file.shape(tensor), file.dtype(tensor))
    if complete != ((form.block_nbytes(i),), torch.uint8):
        raise CorruptError(f"{file.path} has no block {tensor} of {form.block_nbytes(i)} bytes; write the folder again")
    value = file.read(tensor)
    form.set_layout({"blocks": i + 1})
    getattr(form, f"block_{i}").copy_(value)
    return value.nbytes


def trim(forms_of: Mapping[str, Elastic], bits: Mapping[str, float | None]) -> None:
    """Drop blocks for good, the least useful first, until so many bits per weight are left; None: all stay.

    bits: by module. Modules of the same number share it: it is their mean.
    """
    for wanted in {value for value in bits.values() if value is not None}:
        mine = {name: form for name, form in forms_of.items() if bits[name] == wanted and form.loaded}
        weights = sum(form.in_features * form.out_features for form in mine.values())
        least = 8 * block_bytes(mine, dict.fromkeys(mine, 1)) / max(weights, 1)
        drop(
            mine,
            wanted * weights / 8,
            f"bits={wanted:g} is less than one block of each layer takes "
            f"({least:.2f} bits per weight); give more, or a smaller rank",
        )


def drop(forms_of: Mapping[str, Elastic], budget: float, what: str) -> None:
    """Keep the most useful blocks that take at most `budget` bytes, and forget that there were others."""
    for name, n in fitting(forms_of, budget, what, loaded=True).items():
        form = forms_of[name]
        form.set_layout({"blocks": n, "available": n, "order": form.order[:n]})
