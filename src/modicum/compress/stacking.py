"""In which order the blocks of an elastic model are loaded: by what each does for the whole model's loss.

Level by level: with b blocks in every layer, each layer in turn is given its next one, and the loss on
calibration text is measured; blocks of a level are then sorted by it, the lowest first. So layers never
differ by more than one block, and a model of any size is a prefix of the same order (Wang et al. 2024,
arXiv:2410.23918, section 2, "average"). All first blocks come first, as they are always there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from modicum.compress.calibration import nats
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.core.files import write_json
from modicum.model import elastic
from modicum.model.folder import find_folder, load_model, save_model
from modicum.model.linear._elastic import Elastic


@torch.no_grad()
def sort_blocks(
    model: nn.Module, forms: Mapping[str, Elastic], tokens_NT: Tensor, *, events: Events | None = None
) -> list[tuple[str, int, float]]:
    """Measure every block of the elastic forms `forms` in `model` and give them their `order`.

    Costs one pass over `tokens_NT` per block above the first ones, with each weight held once in float32
    meanwhile. Returns (module, block, loss with it in nats per token) in order; the first blocks' is NaN.
    """
    names = list(forms)
    ordered: list[tuple[str, int, float]] = [(name, 0, math.nan) for name in names]
    levels = max(form.loaded for form in forms.values())
    total = sum(form.loaded - 1 for form in forms.values())
    try:
        for form in forms.values():
            form.partial_sum = form.block_weight(0)
        with (events or Events()).progress("sort blocks", total, "block") as progress:
            for level in range(1, levels):
                deeper = [name for name in names if forms[name].loaded > level]
                losses: dict[str, float] = {}
                for name in deeper:
                    form, before = forms[name], forms[name].partial_sum
                    assert before is not None
                    form.partial_sum = before + form.block_weight(level)
                    loss = nats(model, tokens_NT)
                    losses[name] = loss if math.isfinite(loss) else math.inf
                    form.partial_sum = before
                    progress.update(1, loss=loss)
                for name in deeper:
                    weight = forms[name].partial_sum
                    assert weight is not None
                    weight += forms[name].block_weight(level)
                ordered += [(name, level, loss) for name, loss in sorted(losses.items(), key=lambda item: item[1])]
    finally:
        for form in forms.values():
            form.partial_sum = None
    order: dict[str, list[int]] = {name: [] for name in names}
    for rank, (name, _, _) in enumerate(ordered):
        order[name].append(rank)
    for name, form in forms.items():
        form.set_layout({"blocks": form.loaded, "available": form.loaded, "order": order[name]})
    return ordered


def cut(folder: str | Path, size: float, out: str | Path) -> elastic.Resized:
    """Write the elastic model at `folder` to `out` with only the blocks that fit into `size` bytes."""
    source = find_folder(folder)
    if Path(out).resolve() == source.resolve():
        raise UserError(f"{out} is the model itself; write the smaller one to another folder")
    model = load_model(source)
    resized = elastic.resize(model, source, size)
    save_model(model, out, source)
    write_json(
        Path(out) / "compress.json", {"bytes": resized.bytes, "blocks": resized.blocks, "of_blocks": resized.available}
    )
    return resized
